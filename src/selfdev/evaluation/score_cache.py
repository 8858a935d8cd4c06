"""Scores that were measured before on this machine: the same model, asked the same, is not asked again.

An entry is found by what its scores depend on and by no name: the model's weights and what lies beside them (config,
tokenizer), every question as the model sees it (so the data, the template and the few-shot examples) with its gold
answer, how answers are written, read and judged, the device and the type of the weights on it, the number of threads,
the processor's kind, the versions of what computes, and this package's own code. What differs in any of these is
measured anew.

`selfdev evaluate` asks it. A run does not: it scores nothing twice, and what its archive says was measured by it.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import selfdev
from selfdev.evaluation.scoring import Reply, Scored
from selfdev.evaluation.tasks import Question
from selfdev.evaluation.tasks.grading import Grading, Reading
from selfdev.models.device import ON_CPU, Place
from selfdev.models.folder import weights_hash
from selfdev.models.sources import Located, cache_dir

_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files of a model's folder, beside its weights, that its answers depend on."""


_COMPUTING = ("torch", "transformers", "tokenizers", "math-verify")
"""Packages that scores go through."""


@dataclass(frozen=True)
class Remembered:
    """Scores from the cache.

    Attributes:
        scored: what was measured.
        made: when, ISO 8601, UTC.
        seconds: how long the scoring took then: wall clock, and processor time of all threads.
    """

    scored: Scored
    made: str
    seconds: tuple[float, float]


class ScoreCache:
    """A folder of scores, one file an entry.

    Args:
        folder: where; made when the first entry is written. `scores` in the project's cache by default.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or cache_dir() / "scores"

    def get(self, key: str) -> Remembered | None:
        """What was measured under this key; None if nothing was, or if its file is damaged."""
        try:
            entry = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            replies = tuple(
                Reply(text, {name: Reading(**reading) for name, reading in readings.items()})
                for text, readings in entry["replies"]
            )
            kind = torch.bool if entry["right_or_wrong"] else torch.float32
            scored = Scored(torch.tensor(entry["outcomes"], dtype=kind), replies)
            return Remembered(scored, str(entry["made"]), tuple(entry["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, scored: Scored, seconds: tuple[float, float]) -> None:
        """Remember scores; written aside and renamed, so that a reader never sees half of them."""
        entry = {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "right_or_wrong": scored.outcomes.dtype == torch.bool,
            "outcomes": scored.outcomes.tolist(),
            "replies": [
                (reply.text, {name: asdict(reading) for name, reading in reply.readings.items()})
                for reply in scored.replies
            ],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        Path(aside).replace(self.folder / f"{key}.json")


def score_key(model: Located, questions: Sequence[Question], grading: Grading, place: Place = ON_CPU) -> str:
    """What the scores of a model on some questions depend on, 64 hex digits.

    Args:
        model: where its weights lie.
        questions: in the order in which they are asked, which batches depend on.
        grading: how answers are written, read and judged.
        place: where the model computes.
    """
    gpu = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None
    folders = dict.fromkeys((model.folder, model.tokenizer))
    beside = sorted(file for folder in folders for pattern in _BESIDE for file in folder.glob(pattern))
    parts: dict[str, Any] = {
        "weights": weights_hash(*model),
        "beside": [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in beside],
        "questions": [(q.text, q.gold, q.answer) for q in questions],
        "grading": [
            grading.way,
            grading.stop,
            grading.max_new_tokens,
            [(name, e.pattern.pattern, e.pattern.flags, e.pick) for name, e in grading.extractions.items()],
            repr(grading.checker),
        ],
        "place": [str(place), gpu],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "versions": {each: _version(each) for each in _COMPUTING},
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # what this process computes with does not change with its files
def _code() -> str:
    """A hash of this package's modules that scores go through."""
    root = Path(selfdev.__file__).parent
    modules = sorted(file for part in ("evaluation", "models") for file in (root / part).rglob("*.py"))
    digest = hashlib.sha256()
    for module in modules:
        digest.update(module.read_bytes())
    return digest.hexdigest()
