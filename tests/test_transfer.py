"""Transfer of a finished run's programs to models and questions that it has not seen."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripted import PROGRAMS, ScriptedFactory, scripted_config
from selfdev.archive import Archive, Evaluation, TestSealed
from selfdev.cli import main
from selfdev.errors import Interrupted, UserError
from selfdev.evaluation.rivals import spent_on_candidates
from selfdev.evaluation.standing import ranked_new
from selfdev.evaluation.tasks import Split, load_task
from selfdev.merging.discovered import load_candidate
from selfdev.results import Run, Transfer, is_transfer, open_run
from selfdev.runs import resume, run
from selfdev.transfers import transfer
from selfdev.watcher import Silent, Tick
from selfdev.zoo import zoo_models

SEED = "zoo:nano2/seed"
EXPERTS = {name: f"zoo:nano2/{name}" for name in ("tri", "tot", "low")}
"""Three experts, where the run had four."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    task = {"name": "nano", "development": 120, "test": 240, "device": "cpu"}
    config = scripted_config(iterations=1, programs=5, rivals=["task_arithmetic", "dare_ties"], task=task)
    return run(config, tmp_path_factory.mktemp("run") / "run", factory=ScriptedFactory(PROGRAMS[:5]))


@pytest.fixture(scope="module")
def carried(finished: Run) -> Transfer:
    return transfer(finished.folder, SEED, EXPERTS, "nano2")


def test_it_lies_in_the_run_under_its_task_and_weights(finished: Run, carried: Transfer) -> None:
    assert carried.folder.parent == finished.folder / "transfers"
    assert carried.folder.name.startswith("nano2-")
    assert is_transfer(carried)
    with pytest.raises(UserError, match=rf"holds no run itself; in it lie {re.escape(str(carried.folder))}"):
        open_run(carried.folder.parent)
    opened = open_run(carried.folder)
    assert isinstance(opened, Transfer)
    assert opened.best == finished.best
    assert repr(opened) == f"<Transfer {carried.folder}, done>"
    assert opened.summary()["run"]["at_work"] is False
    assert not is_transfer(finished)
    assert carried.archive.run.status == "done"
    assert carried.config.task.device == finished.config.task.device == "cpu"  # it is told nothing of its own


def test_the_finalists_are_applied_as_they_are_at_the_scale_that_the_run_found(
    finished: Run, carried: Transfer
) -> None:
    ranked = ranked_new(finished.archive, "learning")
    assert len(ranked) == 4
    assert any(dev.number for _, dev in ranked)  # the scale of some was tuned
    rows = [row["name"] for row in carried.verdict["table"] if row["kind"] == "discovered"]
    assert rows == [candidate.name for candidate, _ in ranked]
    assert carried.best == finished.best
    for candidate, dev in ranked:
        [test] = carried.archive.evaluations(dev.kind, candidate.name, "test")
        assert (test.number, test.factor) == (dev.number, dev.factor)
        assert carried.archive.candidate(candidate.name).source == candidate.source
        assert test.score is not None


def test_development_questions_tune_the_rivals_and_nothing_else(finished: Run, carried: Transfer) -> None:
    asked = carried.archive.evaluations()
    assert {e.kind for e in asked} == {"seed", "rival"}
    budget = spent_on_candidates(finished.archive)
    assert budget == 4 + 4 + 2 * 2  # as written, at `scaling.norm`, and two of them at two more scales
    for rival in carried.config.rivals:
        assert len(carried.archive.evaluations("rival", rival)) == budget
    of_run = {
        e.parameters["scale"]: e.score for e in finished.archive.evaluations("rival", "task_arithmetic")
    }
    anew = {e.parameters["scale"]: e.score for e in carried.archive.evaluations("rival", "task_arithmetic")}
    assert of_run != anew
    for row in carried.verdict["table"]:
        assert (row["dev"]["score"] is None) == (row["kind"] in ("discovered", "control"))


def test_the_table_is_the_verdict_s(finished: Run, carried: Transfer) -> None:
    table = carried.verdict["table"]
    assert set(table[0]) == set(finished.verdict["table"][0])
    assert [row["kind"] for row in table] == ["seed", "rival", "rival", "control", *["discovered"] * 4]
    for row in table:
        assert row["test"]["questions"] == 240
        assert set(row["tasks"]) == {"gap", "low", "tri", "tot", "rot", "down"}
    best = carried.verdict["best_rival"]
    for row in table:
        assert (row["against_best_rival"] is None) == (row["name"] == best)
    adjusted = [row["against_best_rival"]["p_adjusted"] for row in table if row["kind"] == "discovered"]
    assert all(p is not None for p in adjusted)
    assert best in carried.verdict["headline"]
    gains = carried.summary()["gains"]
    assert gains["candidate"] == finished.best.name
    assert [each["arm"] for each in gains["controls"]] == ["frozen"]
    # One iteration, in which nothing is learned: both arms' best is the same program.
    assert gains["controls"][0]["best_minus_control"]["difference"] == 0


def test_on_the_run_s_own_task_no_question_of_the_run_is_asked(finished: Run, tmp_path: Path) -> None:
    same_task = transfer(finished.folder, SEED, EXPERTS, out=tmp_path / "elsewhere")
    assert same_task.folder == tmp_path / "elsewhere"
    of_run = {q for split in ("development", "test") for q in finished.archive.questions(split)}
    here = [q for split in ("development", "test") for q in same_task.archive.questions(split)]
    assert len(here) == len(set(here)) == 120 + 240
    assert of_run.isdisjoint(here)


def test_the_test_split_opens_once_and_again_is_marked(
    carried: Transfer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(carried.folder, folder)
    origin = carried.folder.parent.parent
    with pytest.raises(UserError, match=r"was opened on .* and opens once"):
        transfer(origin, SEED, EXPERTS, "nano2", folder)
    assert [o.again for o in Transfer(folder).archive.openings()] == [False]
    again = transfer(origin, SEED, EXPERTS, "nano2", folder, again=True)
    assert again.verdict == carried.verdict
    assert [o.again for o in again.archive.openings()] == [False, True]
    assert main(["show", str(folder)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The test split was opened again (--again)" in printed
    assert "Before that, the verdict was: " + carried.verdict["headline"] in printed
    assert main(["show", str(folder), "--json"]) == 0
    [marked] = json.loads(capsys.readouterr().out)["run"]["test_opened_again"]
    assert main(["show", str(folder), next(iter(carried.facts["programs"]))]) == 2
    assert "is a transfer" in capsys.readouterr().err
    assert marked["headline_before"] == carried.verdict["headline"]


def test_what_is_new_on_the_run_s_experts_is_applied_where_it_is_a_mean(tmp_path: Path) -> None:
    largest = (
        "t(deltas):\n    i = deltas.abs().topk(2, dim=0).indices\n    return deltas.gather(0, i).mean(0)\n"
    )
    config = scripted_config(iterations=1, programs=1, rivals=["task_arithmetic"])
    origin = run(config, tmp_path / "run", factory=ScriptedFactory([largest]))
    assert origin.best is not None
    two = transfer(origin.folder, SEED, {name: EXPERTS[name] for name in ("tri", "tot")}, "nano2")
    [row] = [row for row in two.verdict["table"] if row["kind"] == "discovered"]
    assert row["test"]["score"] is not None
    [test] = two.archive.evaluations(subject=row["name"], split="test")
    assert test.failure is None
    assert test.parameters["distance_on_real_tensors"] < 1e-5


def test_a_transferred_program_merges_its_models_at_its_scale(carried: Transfer) -> None:
    for name, scale in carried.facts["programs"].items():
        found = load_candidate(carried.folder, name)
        assert found.factor == scale
        assert found.config.merge.experts == EXPERTS
        assert any(f"| {name} | discovered |  |" in line for line in found.origin.evidence)


class Killed(BaseException):
    """The process ends here."""


class Dies(Silent):
    """Ends the work at the n-th report of a phase, and tries before that to open the test split."""

    def __init__(self, phase: str, report: int, folder: Path):
        self.at, self.left, self.folder = phase, report, folder
        self.sealed = False

    @contextmanager
    def phase(self, name: str, arm: str | None = None, iteration: int | None = None) -> Iterator[Tick]:
        with super().phase(name, arm, iteration) as tick:
            yield _Reports(self, tick) if name == self.at else tick

    def report(self) -> None:
        if self.at == "rivals":
            with Archive.open(self.folder / "archive.db") as archive, pytest.raises(TestSealed):
                archive.opened("nano2")
            self.sealed = True
        self.left -= 1
        if self.left == 0:
            raise Killed


class _Reports(Tick):
    def __init__(self, dies: Dies, tick: Tick):
        super().__init__()
        self.dies = dies

    def __call__(self, done: int, total: int, note: str) -> None:
        self.dies.report()


def test_cut_off_anywhere_it_ends_as_if_it_had_not_been(
    finished: Run, carried: Transfer, tmp_path: Path
) -> None:
    folder = tmp_path / "carried"
    for phase, report in (("rivals", 1), ("rivals", 7), ("verdict", 4)):
        watch = Dies(phase, report, folder)
        with pytest.raises(Killed):
            transfer(finished.folder, SEED, EXPERTS, "nano2", folder, watch=watch)
        assert watch.sealed == (phase == "rivals")
        assert Transfer(folder).archive.run.status != "done"
        assert Transfer(folder).summary()["table"] == []
    ended = transfer(finished.folder, SEED, EXPERTS, "nano2", folder)
    assert ended.verdict == carried.verdict
    assert [e.outcomes for e in ended.archive.evaluations(split="test")] == [
        e.outcomes for e in carried.archive.evaluations(split="test")
    ]
    # The verdict that was cut off had opened the split; both openings are there, and neither is an --again.
    assert [o.again for o in ended.archive.openings()] == [False, False]


def test_experts_in_another_order_are_another_transfer(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "carried"
    with pytest.raises(Killed):
        transfer(finished.folder, SEED, EXPERTS, "nano2", folder, watch=Dies("rivals", 1, folder))
    turned = dict(reversed(EXPERTS.items()))
    with pytest.raises(UserError, match="experts has changed since the run began"):
        transfer(finished.folder, SEED, turned, "nano2", folder)


class Interrupts(Silent):
    def rival(self, best: Evaluation | None) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_names_the_way_on(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="Go on with: the same command"):
        transfer(finished.folder, SEED, EXPERTS, "nano2", tmp_path / "t", watch=Interrupts())


def test_a_rival_for_another_number_of_experts_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {name: EXPERTS[name] for name in ("tri", "tot")}
    pair = run(
        scripted_config(
            iterations=1,
            programs=2,
            rivals=["slerp", "task_arithmetic"],
            merge={"seed": "zoo:nano/seed", "experts": {n: f"zoo:nano/{n}" for n in ("add", "sub")}},
        ),
        tmp_path / "pair",
        factory=ScriptedFactory(PROGRAMS[:2]),
    )
    assert transfer(pair.folder, SEED, two, "nano2").facts["left_out"] == []
    three = transfer(pair.folder, SEED, EXPERTS, "nano2")
    assert three.facts["left_out"] == ["slerp"]
    assert main(["show", str(three.folder)]) == 0
    assert "Left out, for the number of experts: slerp" in " ".join(capsys.readouterr().out.split())


def test_the_command_line(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "carried"
    words = ["transfer", str(finished.folder), "--seed", SEED, "--task", "nano2", "--out", str(out), "--json"]
    for name, source in EXPERTS.items():
        words += ["--expert", f"{name}={source}"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "best on development so far" not in printed.err  # no program is scored there
    assert "best rival: " in printed.err
    shown = json.loads(printed.out)
    assert shown == Transfer(out).summary()
    assert shown["transfer"]["experts"] == EXPERTS
    assert list(shown["transfer"]["programs"]) == [
        row["name"] for row in shown["table"] if row["kind"] == "discovered"
    ]
    assert main(words) == 2
    assert "--again measures everybody once more" in capsys.readouterr().err
    assert main(["show", str(out)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "neither split holds a question that the run asked" in page
    assert "12 development evaluations each, as in the run" in page


# --- bad input ends before anything is started


@pytest.fixture
def refused(finished: Run, tmp_path: Path):
    """Asks for an impossible transfer, and sees that nothing was started."""

    def ask(
        match: str, run: Path | None = None, seed: str = SEED, experts: object = EXPERTS, task: str = "nano2"
    ):
        out = tmp_path / "never"
        with pytest.raises(UserError, match=match):
            transfer(run or finished.folder, seed, experts, task, out)  # type: ignore[arg-type]
        assert not out.exists()

    return ask


def test_a_run_that_is_not_over(refused, finished: Run, tmp_path: Path) -> None:
    record = replace(finished.archive.run, status="running")
    Archive.create(tmp_path / "young" / "archive.db", record).close()
    refused("is not finished .status: running.*selfdev resume", run=tmp_path / "young")
    refused("holds no run", run=tmp_path / "nothing")


def test_a_run_that_found_nothing_new(refused, finished: Run, tmp_path: Path) -> None:
    with Archive.create(tmp_path / "barren" / "archive.db", finished.archive.run) as archive:
        archive.set_verdict({})
        archive.set_status("done")
    refused("has no winner", run=tmp_path / "barren")


def test_a_transfer_is_no_run(refused, carried: Transfer, finished: Run, tmp_path: Path) -> None:
    refused("is a transfer; give the run", run=carried.folder)
    with pytest.raises(UserError, match="give the `selfdev transfer` command again"):
        resume(carried.folder)
    with pytest.raises(UserError, match="holds a run; choose another --out"):
        transfer(finished.folder, SEED, EXPERTS, "nano2", finished.folder)
    with pytest.raises(UserError, match="holds no transfer yet"):
        transfer(finished.folder, SEED, EXPERTS, "nano2", tmp_path / "new", again=True)
    two = {name: EXPERTS[name] for name in ("tri", "tot")}
    copy = shutil.copytree(carried.folder, tmp_path / "copy")
    with Archive.open(copy / "archive.db") as archive:
        archive.set_status("verdict")
    with pytest.raises(UserError, match="experts has changed"):
        transfer(finished.folder, SEED, two, "nano2", copy)


def test_experts_that_are_seen_or_say_nothing(refused) -> None:
    mixed = {"x": "zoo:nano/add", "y": "zoo:nano/sub"}
    refused("'x' is not unseen: its weights are those of 'add'", seed="zoo:nano/seed", experts=mixed)
    refused("'y' has the seed's weights", experts={"x": EXPERTS["tri"], "y": SEED})
    refused("'x' and 'y' have the same weights", experts={"x": EXPERTS["tri"], "y": EXPERTS["tri"]})
    refused("min|at least 2", experts={"x": EXPERTS["tri"]})


def test_experts_of_another_shape(refused, tmp_path: Path) -> None:
    odd = shutil.copytree(zoo_models("nano2")["experts"]["tri"], tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors")
    name = next(key for key in tensors if key.endswith("mlp.up_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, odd / "model.safetensors")
    refused("has shape .* and the seed's has", experts={"odd": str(odd), "tot": EXPERTS["tot"]})


def test_an_unknown_task_and_one_without_questions_left(refused, finished: Run, tmp_path: Path) -> None:
    refused("unknown task 'nanno2'; the nearest known one is 'nano2'", task="nanno2")
    nano = load_task("nano")
    with Archive.create(
        tmp_path / "greedy" / "archive.db", replace(finished.archive.run, status="verdict")
    ) as archive:
        everything = nano.open_test(nano.size(Split.TEST), archive)
        archive.set_questions("test", [(q.id, q.group) for q in everything])
        archive.set_questions("development", [(q.id, q.group) for q in nano.development(120, 1)])
        archive.keep_programs(finished.candidates("learning"))
        archive.add_evaluation(finished.archive.evaluations("candidate")[-1])
        archive.set_verdict({})
    left = "so many test questions of task 'nano' that 0 are left, .* fewer than 100 tell nothing apart"
    refused(left, run=tmp_path / "greedy", task="nano")
