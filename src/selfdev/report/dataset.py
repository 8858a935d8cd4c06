"""The preference pairs of a run as a Hugging Face dataset, in TRL's columns, with where every program came from."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdev.archive import Candidate
from selfdev.errors import UserError
from selfdev.evaluation.standing import LEARNING
from selfdev.preferences import asked

if TYPE_CHECKING:
    from selfdev.runs import Run

_CARD = """\
---
pretty_name: Preference pairs of the run {name}
tags: [preference, dpo, model-merging, selfdev]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.jsonl
---

# Preference pairs of the run `{name}`

{count} pairs of merging algorithms in {rounds} rounds, written by `{model}` in a run of selfdev {version}: one file a
round. `prompt`, `chosen` and `rejected` are what DPO trains on, as TRL names them: the completion as it was written,
and `*_tokens` the very token ids that were sampled. `reason` says why the second one is rejected: `score`, `copy` (it
works and invents nothing), `failure`, or `repair` (it fails, and the chosen one is a working neighbour that nobody
wrote). Scores are shares of {questions} development questions, null where there is none.

**The programs were written by a language model. Do not run them outside a jail.**
"""


def export_pairs(run: "Run", out: Path) -> int:
    """Write the pairs of every round.

    Args:
        run: finished or not.
        out: a folder that does not exist yet; `datasets.load_dataset(out)` reads it.

    Returns:
        How many pairs there are.

    Raises:
        UserError: the folder exists, or the run has no pairs.
    """
    if out.exists():
        raise UserError(f"'{out}' exists; choose another folder")
    rounds = {t: list(_rows(run, t)) for t in range(run.config.iterations)}
    rounds = {t: rows for t, rows in rounds.items() if rows}
    count = sum(map(len, rounds.values()))
    if not count:
        raise UserError(f"the run '{run.archive.run.name}' has no preference pairs (yet)")
    (out / "data").mkdir(parents=True)
    for t, rows in rounds.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "data" / f"round-{t + 1:02d}.jsonl").write_text(lines)
    card = _CARD.format(
        name=run.archive.run.name,
        count=count,
        rounds=len(rounds),
        model=run.config.factory.model,
        version=run.archive.run.facts.get("versions", {}).get("selfdev", "of unknown version"),
        questions=len(run.archive.groups("development")),
    )
    (out / "README.md").write_text(card)
    return count


def _rows(run: "Run", t: int) -> Iterator[dict[str, Any]]:
    archive = run.archive
    evaluations = archive.evaluations("candidate") + archive.evaluations("scaled")
    scores: dict[str, float] = {}
    for each in evaluations:
        if each.score is not None:
            scores[each.subject] = max(scores.get(each.subject, -math.inf), each.score)
    prompts = {i.iteration: i.prompts for i in archive.iterations(LEARNING)}
    candidates = {c.name: c for c in archive.candidates()}
    for pair in archive.pairs(LEARNING, t):
        chosen, rejected = candidates[pair.chosen], candidates[pair.rejected]
        under = candidates[asked(pair)]
        yield {
            "prompt": prompts[under.iteration][under.prompt],
            "chosen": chosen.text,
            "rejected": rejected.text,
            "reason": pair.reason,
            "round": t + 1,
            **_side("chosen", chosen, scores),
            **_side("rejected", rejected, scores),
            "run": archive.run.name,
            "run_seed": archive.run.seed,
            "factory_weights": archive.run.facts.get("factory", {}).get("weights"),
        }


def _side(side: str, candidate: Candidate, scores: dict[str, float]) -> dict[str, Any]:
    return {
        f"{side}_name": candidate.name,
        f"{side}_status": candidate.status,
        f"{side}_failure": candidate.failure,
        f"{side}_score": scores.get(candidate.name),
        f"{side}_source": candidate.source,
        f"{side}_tokens": list(candidate.tokens),
    }
