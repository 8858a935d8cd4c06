"""Transfer: what a run discovered, applied unchanged to models that it has not seen.

The finalists of a finished run, each at the scale at which the run measured it best, merge other experts, or experts of
another seed, beside rivals that are tuned anew for these experts, each with as many development evaluations as in the
run. The development questions of a transfer tune the rivals and nothing else: the programs are applied as they are, and
which of them the headline is about was decided by the run.

A transfer has questions of its own. Those that the run asked, on development or on test, and their rewordings are
left out of both its splits, and its test split is sealed by its own archive until every rival is tuned. It opens once;
`again` opens it once more and is marked.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfdev.algorithms.library import method
from selfdev.archive import ARCHIVE, FACTOR, Archive
from selfdev.config import Config, parse_config
from selfdev.errors import UserError
from selfdev.evaluation.evaluator import Evaluator, Scorer, score_seed
from selfdev.evaluation.objective import Objective
from selfdev.evaluation.rivals import spent_on_candidates, tune_rivals
from selfdev.evaluation.tasks import Split, Task, load_task
from selfdev.evaluation.verdict import Entrant, finalists, reach_verdict
from selfdev.merging.relatives import find_relatives
from selfdev.merging.task_vectors import TaskVectors, read_task_vectors
from selfdev.models.device import Place
from selfdev.results import TRANSFER, Run, Transfer, is_transfer
from selfdev.sandbox import Sandbox
from selfdev.session import alone, archived, machine_facts, told
from selfdev.watcher import Silent, Watcher

FEWEST = 100
"""Questions that a split must have left for a transfer, unless the run itself asked fewer."""

FOLDER = "transfers"
"""Of a run's folder, where its transfers lie."""


def transfer(
    run: Run | Path | str,
    seed: str,
    experts: Mapping[str, str],
    task: str | None = None,
    out: Path | str | None = None,
    *,
    again: bool = False,
    watch: Watcher | None = None,
    unsafe_sandbox: bool = False,
) -> Transfer:
    """Apply a run's best algorithms unchanged to other models, beside rivals tuned for these.

    One that was interrupted or killed goes on when it is called again.

    Args:
        run: folder of a finished run.
        seed: where the seed comes from; see `selfdev.models.sources`.
        experts: name of each expert, and where it comes from; programs see them in this order.
        task: whose questions decide; the run's by default.
        out: the transfer's folder; by default one in the run's that is named after the task and the weights.
        again: open the test split of a finished transfer once more and measure everybody anew.
        watch: is told what happens.
        unsafe_sandbox: leave the jail out and run model-written code with resource limits alone.

    Raises:
        UserError: the run is not finished or found nothing new, a model or the task cannot be used or is not unseen,
            or the test split has been opened already; nothing has been started.
        Interrupted: Ctrl-C.
    """
    plan = _plan(run if isinstance(run, Run) else Run(Path(run)), seed, experts, task)
    folder = plan.folder if out is None else Path(out)
    _check_folder(folder, again)
    watch, began = watch or Silent(), time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(told(folder, go_on="the same command"))
        stack.enter_context(alone(folder))
        with watch.phase("models"):
            box = stack.enter_context(
                Sandbox(plan.config.jail.limits, unsafe=unsafe_sandbox, workers=plan.config.jail.workers)
            )
            scorer = Evaluator(
                plan.seed,
                plan.vectors,
                plan.task,
                plan.config.task.development,
                box,
                plan.config.seed,
                Objective(plan.config.task.weights),
                plan.asked,
                plan.place,
            )
            scorer.check_test(plan.config.task.test)
        facts = {**plan.facts, **machine_facts(unsafe_sandbox)}
        preset = f"transfer of {plan.facts[TRANSFER]['run']}"
        archive = stack.enter_context(archived(folder, preset, plan.config, facts, began, again=again))
        _carry_out(archive, plan, scorer, watch)
    return Transfer(folder)


@dataclass(frozen=True)
class _Plan:
    """A transfer whose input has been checked.

    Attributes:
        folder: where it lies by default.
        config: the run's, with the models, the task and the counts of the transfer.
        seed: folder of the seed.
        vectors: of its experts.
        task: whose questions are asked.
        asked: ids of the questions that the run has asked.
        entrants: the run's programs, best on its development first; controls before them.
        budget: development evaluations of each rival.
        place: where merged models answer.
        facts: what its archive stands on.
    """

    folder: Path
    config: Config
    seed: Path
    vectors: TaskVectors
    task: Task
    asked: frozenset[str]
    entrants: list[Entrant]
    budget: int
    place: Place
    facts: dict[str, Any]


def _plan(origin: Run, seed: str, experts: Mapping[str, str], task_name: str | None) -> _Plan:
    """Check what is asked for, before anything is started.

    Raises:
        UserError: see `transfer`.
    """
    record, archive = origin.archive.run, origin.archive
    if is_transfer(origin):
        raise UserError(f"{origin.folder} is a transfer; give the run that discovered the programs")
    if record.status != "done":
        raise UserError(
            f"{origin.folder} is not finished (status: {record.status}), and its best algorithms are known when it is; "
            f"`selfdev resume {origin.folder}` goes on with it"
        )
    entrants = [_bare(each) for each in finalists(archive, origin.config)]
    discovered = [each.dev for each in entrants if each.kind == "discovered"]
    if not discovered:
        raise UserError(f"{origin.folder} has no winner, so there is nothing to transfer; choose another run")

    found = find_relatives(seed, experts)
    weights, hashes = found.seed_hash, found.expert_hashes
    _check_unseen(record.facts, weights, hashes)
    vectors = read_task_vectors(found.seed, found.experts, origin.config.merge.targets)

    task = load_task(task_name or origin.config.task.name)
    asked = frozenset(archive.questions("development") + archive.questions("test"))
    config, left_out = _config(origin, seed, experts, task_name, task, asked)
    budget = spent_on_candidates(archive)
    place = Place.of(config.task.device, config.task.dtype, "task.device")
    facts = {
        TRANSFER: {
            "run": record.name,
            "created": record.created,
            "programs": {dev.subject: dev.factor for dev in discovered},
            "evaluations": budget,
            "left_out": left_out,
        },
        "seed": weights,
        "experts": hashes,
        "task": task.fingerprint,
        "task.device": str(place),
    }
    identity = json.dumps([weights, list(hashes.items()), task.fingerprint])
    name = f"{task.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    folder = origin.folder / FOLDER / name
    return _Plan(folder, config, found.seed, vectors, task, asked, entrants, budget, place, facts)


def _bare(entrant: Entrant) -> Entrant:
    """A finalist of the run, of whose evaluation nothing is kept but the scale."""
    dev = entrant.dev
    scale = {FACTOR: dev.factor} if dev.number else {}
    bare = replace(dev, parameters=scale, outcomes=None, score=None, questions=0, asked=None)
    return replace(entrant, dev=bare)


def _check_unseen(run: Mapping[str, Any], seed: str, experts: Mapping[str, str]) -> None:
    """Raise UserError unless the experts are none that the run merged into this seed.

    Args:
        run: the run's facts, hashes of weights among them.
        seed: hash of the seed's weights.
        experts: hash of each expert's.
    """
    seen = {weights: name for name, weights in run["experts"].items()} if run["seed"] == seed else {}
    for name, weights in experts.items():
        if weights in seen:
            raise UserError(
                f"expert '{name}' is not unseen: its weights are those of '{seen[weights]}', which the run merged into "
                "this very seed; give experts that the run has not merged, or another seed"
            )


def _config(
    origin: Run,
    seed: str,
    experts: Mapping[str, str],
    task_name: str | None,
    task: Task,
    asked: frozenset[str],
) -> tuple[Config, list[str]]:
    """The run's config with the transfer's models and task, and the rivals that cannot merge so many experts."""
    of_run = origin.config
    counts = {}
    for split, wanted in ((Split.DEVELOPMENT, of_run.task.development), (Split.TEST, of_run.task.test)):
        left = task.size(split, asked)
        if left < min(wanted, FEWEST):
            raise UserError(
                f"the run has asked so many {split} questions of task '{task.name}' that {left} are left, with the "
                f"groups balanced, and fewer than {min(wanted, FEWEST)} tell nothing apart; name another task with "
                "--task"
            )
        counts[str(split)] = min(wanted, left)
    same = task.fingerprint == origin.archive.run.facts["task"]
    settings = of_run.task.model_dump(mode="json", exclude=set() if same else {"weights", "floors"})
    rivals = {name: method(name).experts for name in of_run.rivals}
    left_out = [name for name, count in rivals.items() if count not in (None, len(experts))]
    changed = of_run.model_dump(mode="json") | {
        "merge": {"seed": seed, "experts": dict(experts), "targets": of_run.merge.targets},
        "task": {**settings, "name": task_name or of_run.task.name, **counts},
        "rivals": [name for name in rivals if name not in left_out],
    }
    return parse_config(changed, "transfer"), left_out


def _check_folder(folder: Path, again: bool) -> None:
    """Raise UserError if the folder holds something else, or a finished transfer that is not to be opened again."""
    if not (folder / ARCHIVE).exists():
        if again:
            raise UserError(
                f"{folder} holds no transfer yet, and its test split opens a first time; leave --again out"
            )
        return
    before = Run(folder)
    if not is_transfer(before):
        raise UserError(f"{folder} holds a run; choose another --out")
    if again:
        with told(folder):
            before.archive.check_reached()
    elif before.archive.run.status == "done":
        opened = before.archive.openings()[-1].opened
        raise UserError(
            f"{folder} is finished: its test split was opened on {opened}, and opens once; `selfdev show {folder}` "
            "shows the result. --again measures everybody once more and marks it"
        )


def _carry_out(archive: Archive, plan: _Plan, scorer: Scorer, watch: Watcher) -> None:
    """Tune the rivals and reach the verdict, from wherever the archive stands."""
    if archive.run.status == "running":
        archive.keep_programs([each.candidate for each in plan.entrants if each.candidate is not None])
        score_seed(archive, scorer)
        with watch.phase("rivals") as tick:
            tune_rivals(archive, plan.config, scorer, plan.budget, tick, watch.rival)
    if archive.run.status != "done":
        with watch.phase("verdict") as tick:
            reach_verdict(archive, plan.config, scorer, plan.entrants, tick)
