"""Runs whose programs a server writes.

As a program: `python tests/endpoint_runs.py RUN URL KILL_AT [MODEL]` begins or resumes one, and ends itself with
SIGKILL when the progress reports reach KILL_AT; see `scripted.py`. With a model's folder it learns.
"""

import sys
from pathlib import Path
from typing import Any

from scripted import Killer, scripted_config
from selfdev.config import Config
from selfdev.results import Run
from selfdev.runs import resume, run

PATIENT = {"concurrency": 4, "timeout": 60.0, "backoff": 0.01, "patience": 2.0, "retries": 4}
"""Waits that a test can afford."""


def searching_config(url: str, *, programs: int = 12, iterations: int = 1, **changes: Any) -> Config:
    """A run that only searches: the server's model has no weights here.

    Args:
        url: of the server.
        programs: to be written by the one arm in each iteration.
        iterations: how many.
        changes: fields of `factory.endpoint`, but for `form`, `max_new_tokens`, and `weights` (`factory.model`).
    """
    form, max_new_tokens = changes.pop("form", "short"), changes.pop("max_new_tokens", 60)
    weights = changes.pop("weights", "endpoint:unruly")
    return scripted_config(
        programs=programs,
        iterations=iterations,
        factory={
            "model": weights,
            "max_new_tokens": max_new_tokens,
            "endpoint": {"url": url, **PATIENT, **changes},
        },
        prompt={"form": form, "names": ["vote"]},
        refinement={"refit": "never"},
        controls=[],
        scaling={},
        rivals=[],
    )


def learning_config(url: str, model: Path, *, programs: int = 8, **changes: Any) -> Config:
    """A run that learns: the server is vLLM, or does as it does, and the weights are here too."""
    changes |= {"weights": str(model), "model": "unruly", "adapters": "vllm"}
    config = searching_config(url, programs=programs, **changes)
    refinement = {"rank": 4, "learning_rate": 1e-2, "beta": 0.1, "refit": "fresh", "min_pairs": 1}
    return type(config)(**config.model_dump() | {"refinement": refinement})


def begin_or_resume(
    folder: Path, url: str, kill_at: str | None = None, model: Path | None = None, **changes: Any
) -> Run:
    watch = Killer(kill_at) if kill_at else None
    if (folder / "archive.db").exists():
        return resume(folder, watch=watch)
    if model is None:
        return run(searching_config(url, **changes), folder, watch=watch)
    config = learning_config(url, model, iterations=2, max_new_tokens=250, **changes)
    return run(config.model_copy(update={"controls": ("frozen",)}), folder, watch=watch)


if __name__ == "__main__":
    begin_or_resume(Path(sys.argv[1]), *sys.argv[2:4], *map(Path, sys.argv[4:]))
