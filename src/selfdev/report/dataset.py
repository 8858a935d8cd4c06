"""The preference pairs of a run as a Hugging Face dataset, in TRL's columns, with where every program came from."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import OPENING, wrap_short
from selfdev.archive import Candidate, Pair
from selfdev.errors import SelfdevError, UserError
from selfdev.evaluation.standing import LEARNING, is_written, ranked_new, scores_on_first
from selfdev.preferences import asked

if TYPE_CHECKING:
    from selfdev.results import Run

_SIDE = {
    "name": "string",
    "status": "string",
    "failure": "string",
    "error": "string",
    "nearest": "string",
    "score": "float64",
    "log_prob": "float64",
    "log_probs": "float32",
    "temperature": "float64",
    "source": "string",
    "tokens": "int32",
}
_COLUMNS = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "reason", "arm"), "string"),
    "round": "int64",
    **{f"{side}_{column}": kind for side in ("chosen", "rejected") for column, kind in _SIDE.items()},
    "run": "string",
    "run_seed": "int64",
    "factory_weights": "string",
    "adapter": "string",
}
"""Every column and its type, stated in the card: of one that is null in a whole file, a reader cannot see it."""

_CARD = """\
---
pretty_name: Preference pairs of the run {name}
tags: [preference, dpo, model-merging, selfdev]
configs:
- config_name: {config}
  data_files:
  - split: train
    path: data/*.jsonl
dataset_info:
  config_name: {config}
  features:
{features}
---

# Preference pairs of the run `{name}`

{count} pairs of merging algorithms in {rounds} rounds, written by `{model}` in a run of selfdev {version}: one file a
round, with the pairs of every arm that learns (`arm`). `prompt`, `chosen` and `rejected` are what preferences are
learned from, as TRL names them: the completion as it was written, and `*_tokens` the token ids that are trained on.
What a round imitates is in no pair, and not here.

`reason` says why the second one is rejected:

| `reason` | the rejected program |
| --- | --- |
| `score` | scores less |
| `copy` | works and invents nothing |
| `failure` | fails |
| `repair` | fails, and the chosen one is a working neighbour that nobody wrote |
| `shown` | is a worked example that the prompt shows, and nobody wrote it (`refinement.shun_examples`) |

`*_score` is the score from which the pair was made: on the development questions, at the better of the scales that
had been tried then; higher is better, null where nothing was scored. In a race one that was left out early, or loses
more than a floor allows, has that on the first questions, which all have answered. `*_log_prob` is that of the
completion in nats at temperature 1, by the factory that wrote it at `*_temperature`, `*_log_probs` of each of its
tokens; null for what nobody wrote.
`*_tokens` are null for an example. `adapter` is the SHA-256 of the weights that the round saved, null where it saved
none: from them come the arm's next programs, and the first ones from `factory_weights`, with the run's warm start if
it has one. With `refinement.refit: fresh` a round trains on the pairs of all rounds up to it. `*_failure` and
`*_error` say how a program fails, `*_nearest` what it is, or is nearest to: for a copy, the program that it copies.
`provenance.json` has the run's config, the hashes and versions that it stands on, and of every round its settings and
losses.

**The programs were written by a language model. Do not run them outside a jail.**
"""


def export_pairs(run: "Run", out: Path) -> int:
    """Write the pairs of every round of every arm that learns.

    Args:
        run: finished or not.
        out: a folder that does not exist yet; `datasets.load_dataset(out)` reads it.

    Returns:
        How many pairs there are.

    Raises:
        UserError: the folder exists, or the run has no pairs.
        SelfdevError: it cannot be written.
    """
    if out.exists():
        raise UserError(f"'{out}' exists; choose another folder")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    arms = [_Arm(run, arm) for arm in (LEARNING, *run.config.controls)]
    rounds = {t: [row for arm in arms for row in arm.rows(t)] for t in range(run.config.iterations)}
    rounds = {t: rows for t, rows in rounds.items() if rows}
    count = sum(map(len, rounds.values()))
    if not count:
        raise UserError(f"the run '{run.archive.run.name}' has no preference pairs: {_why_none(run)}")
    try:
        (aside / "data").mkdir(parents=True)
        digest = hashlib.sha256()
        for t, rows in rounds.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (aside / "data" / f"round-{t + 1:02d}.jsonl").write_text(lines)
            digest.update(lines.encode())
        (aside / "provenance.json").write_text(json.dumps(_provenance(run), indent=2) + "\n")
        (aside / "README.md").write_text(_card(run, count, len(rounds), digest.hexdigest()[:8]))
        aside.rename(out)
    except OSError as error:
        raise SelfdevError(f"'{out}' cannot be written: {error}; nothing of it is kept") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return count


def _why_none(run: "Run") -> str:
    rounds = [r for arm in (LEARNING, *run.config.controls) for r in run.archive.refinements(arm)]
    if not rounds:
        learns = run.config.refinement.refit != "never" and run.config.iterations > 1
        return "no round of learning has been reached" if learns else "it learns nothing"
    said = dict.fromkeys(r.why_nothing or "a round imitated programs alone" for r in rounds)
    return "; ".join(said)


def _provenance(run: "Run") -> dict[str, Any]:
    """What made the pairs, and what each round did with them."""
    return {
        "config": run.config.model_dump(mode="json"),
        "facts": run.archive.run.facts,
        "rounds": [
            {"arm": arm, "round": each.iteration + 1, **each.facts}
            for arm in (LEARNING, *run.config.controls)
            for each in run.archive.refinements(arm)
        ],
    }


def _card(run: "Run", count: int, rounds: int, digest: str) -> str:
    return _CARD.format(
        # Of local folders `datasets` keeps what it has read under the names of folder and config, whatever is in it.
        config=f"pairs-{digest}",
        name=run.archive.run.name,
        count=count,
        rounds=rounds,
        model=run.config.factory.model,
        version=run.archive.run.facts.get("versions", {}).get("selfdev", "of unknown version"),
        features="\n".join(_feature(column, kind) for column, kind in _COLUMNS.items()),
    )


def _feature(column: str, kind: str) -> str:
    return f"  - name: {column}\n    {'sequence' if column.endswith(('_tokens', '_log_probs')) else 'dtype'}: {kind}"


class _Arm:
    """The pairs of one arm, and what is known of their programs."""

    def __init__(self, run: "Run", arm: str):
        self.run, self.arm, self.archive = run, arm, run.archive
        self.iterations = {i.iteration: i for i in self.archive.iterations(arm)}
        self.candidates = {c.name: c for c in self.archive.candidates()}
        self.refinements = {r.iteration: r for r in self.archive.refinements(arm)}
        # As preferences are made: by all questions who answered them, by those that all have answered who did not.
        ranked = ranked_new(self.archive, arm, tuned=False)
        finished = {c.name: e.score for c, e in ranked if e.score is not None}
        self.scores = scores_on_first(self.archive) | finished

    def rows(self, t: int) -> Iterator[dict[str, Any]]:
        """What iteration t taught."""
        for pair in self.archive.pairs(self.arm, t):
            rejected = self.candidates[pair.rejected]
            side = self._side("rejected", rejected)
            yield self._row(
                t, self._prompt(pair), pair.chosen, side | {"rejected": rejected.text}, pair.reason
            )
        for prompt, chosen, example in self._shown(t):
            short = examples()[example]
            side = dict.fromkeys(f"rejected_{column}" for column in _SIDE) | {
                "rejected": short.removeprefix(OPENING),
                "rejected_name": f"example {example}",
                "rejected_status": "known",
                "rejected_source": wrap_short(short),
            }
            yield self._row(t, prompt, chosen, side, "shown")

    def _prompt(self, pair: Pair) -> str:
        under = self.candidates[asked(pair)]
        return self.iterations[under.iteration].prompts[under.prompt]

    def _row(self, t: int, prompt: str, chosen: str, rejected: dict[str, Any], reason: str) -> dict[str, Any]:
        record, refinement = self.archive.run, self.refinements.get(t)
        return {
            "prompt": prompt,
            "chosen": self.candidates[chosen].text,
            "reason": reason,
            "arm": self.arm,
            "round": t + 1,
            **self._side("chosen", self.candidates[chosen]),
            **rejected,
            "run": record.name,
            "run_seed": record.seed,
            "factory_weights": record.facts.get("factory", {}).get("weights"),
            "adapter": None if refinement is None else refinement.facts.get("adapter"),
        }

    def _side(self, side: str, candidate: Candidate) -> dict[str, Any]:
        written = is_written(candidate.arm)
        return {
            f"{side}_name": candidate.name,
            f"{side}_status": candidate.status,
            f"{side}_failure": candidate.failure,
            f"{side}_error": candidate.error,
            f"{side}_nearest": candidate.nearest,
            f"{side}_score": self.scores.get(candidate.name),
            f"{side}_log_prob": candidate.log_prob,
            f"{side}_log_probs": None if candidate.log_probs is None else list(candidate.log_probs),
            f"{side}_temperature": self.iterations[candidate.iteration].temperature if written else None,
            f"{side}_source": candidate.source,
            f"{side}_tokens": list(candidate.tokens),
        }

    def _shown(self, t: int) -> list[tuple[str, str, str]]:
        """The examples that round t rejects: prompt, name of the program preferred, example.

        Like the pairs, those that a fresh adapter meets again are told once.
        """
        fresh = self.run.config.refinement.refit == "fresh"
        before = {shown for round_ in range(t) for shown in self._shunned(round_)} if fresh else set()
        return [shown for shown in self._shunned(t) if shown not in before]

    def _shunned(self, t: int) -> list[tuple[str, str, str]]:
        settings, refinement = self.run.config.refinement, self.refinements.get(t)
        if refinement is None or not refinement.facts.get("shunned"):
            return []
        rounds = range(t + 1) if settings.refit == "fresh" else [t]
        pairs = [pair for round_ in rounds for pair in self.archive.pairs(self.arm, round_)]
        under = [(self._prompt(pair), self.candidates[pair.chosen]) for pair in pairs]
        return list(_shunned(under, settings.shun_examples))


def _shunned(pairs: Iterable[tuple[str, Candidate]], count: int) -> Iterator[tuple[str, str, str]]:
    """Under each prompt, its chosen programs in turn, and the worked examples that it shows first.

    This is what `LocalFactory.refine` makes of its pairs, read from the text of the prompts.
    """
    chosen: dict[str, dict[tuple[int, ...], str]] = {}
    for prompt, candidate in pairs:
        chosen.setdefault(prompt, {}).setdefault(candidate.tokens, candidate.name)
    sources = examples()
    for prompt, answers in chosen.items():
        begins = [match.start() for match in re.finditer(f"^{OPENING}", prompt, re.MULTILINE)]
        for place, begin in enumerate(begins[:-1][:count]):  # the last one is to be continued
            name = prompt[begin:].removeprefix(OPENING).partition("(")[0]
            if name in sources and prompt.startswith(sources[name], begin):
                yield prompt, list(answers.values())[place % len(answers)], name
