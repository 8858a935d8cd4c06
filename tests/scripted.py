"""A run whose factory is scripted, and whose process can be killed anywhere.

As a program: `python tests/scripted.py RUN KILL_AT [MODEL]` begins or resumes the run, and ends itself with SIGKILL when
the progress reports reach `KILL_AT`, such as `judge:3` (the third report of that phase's kind). With a model's folder
that model is the factory, and nothing is scripted.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from selfdev.config import Config, parse_config
from selfdev.factory.prompt import Prompt
from selfdev.factory.sampling import Sample
from selfdev.factory.taught import Taught
from selfdev.results import Run, open_run
from selfdev.runs import resume, run
from selfdev.watcher import Silent, Tick

PROGRAMS = [
    # New: none of them is in the library, among the examples or a constant combination.
    "a(deltas):\n    s = deltas\n    return 0.3 * s.sum(0) * (1 + torch.tanh(s.abs().mean(0) / s.abs().mean()))\n",
    "b(deltas):\n    s = deltas\n    w = s.abs().amax(0)\n    return 0.35 * s.sum(0) * w / (w + s.abs().mean())\n",
    "c(deltas):\n    m = sum(deltas)\n    return 0.3 * torch.roll(m, 1, 0)\n",
    "d(deltas):\n    m = sum(deltas)\n    return 0.3 * m * (m.abs() < 2 * m.abs().mean()) + 0.1 * m.abs().mean() * m.sign()\n",
    # Trivial, known, known with another constant, repeated, repeated with other names.
    "e(deltas):\n    return 0.3 * sum(deltas)\n",
    "f(deltas):\n    return deltas.median(dim=0).values\n",
    "g(deltas):\n    index = deltas.abs().argmax(dim=0, keepdim=True)\n"
    "    return 0.5 * deltas.gather(0, index).squeeze(0)\n",
    "c2(deltas):\n    m = sum(deltas)\n    return 0.3 * torch.roll(m, 1, 0)\n",
    # Failing: syntax, type, shape, time, not a number, no function.
    "h(deltas):\n    return (\n",
    "i(deltas):\n    return deltas + None\n",
    "j(deltas):\n    return (deltas.abs().sqrt() * deltas).sum()\n",
    "k(deltas):\n    while True:\n        pass\n",
    "l(deltas):\n    return deltas[0] / 0\n",
    "this is no function",
    # Random: seeded by itself, and as the jail seeds it.
    "n(deltas):\n    torch.seed()\n    return 0.3 * sum(deltas) * torch.rand_like(deltas[0])\n",
    "o(deltas):\n    s = deltas\n    return 0.3 * s.sum(0) * torch.rand_like(s[0])\n",
]
"""What a short program's opening is continued with; iteration t writes a variation on it."""

VARIATION = "v{t}_{i}(deltas):\n    s = deltas\n    m = s.sum(0)\n    return 0.3 * m{suffix}\n"


class ScriptedFactory:
    """Writes a fixed list in the first iteration and, once refined, mostly variations that are new."""

    def __init__(self, programs: Sequence[str] = PROGRAMS, name: str = "scripted"):
        self.programs = list(programs)
        self.facts = {"model": name}

    def prepare(self, tick: Any) -> None:
        tick(1, 1, "")

    def prompts(self, iteration: int) -> list[Prompt]:
        return [Prompt(f"prompt {i}", (), form="short") for i in range(2)]  # type: ignore[arg-type]

    def write(
        self,
        asked: Sequence[tuple[int, Prompt]],
        iteration: int,
        temperature: float,
        adapters: Sequence[Path],
        tick: Any,
    ) -> list[Sample]:
        texts = list(self.programs)
        if iteration:  # one endless loop an arm is enough: each costs its time-out
            texts = [text.replace("while True:\n        pass", "return None") for text in texts]
        if adapters:
            learned = int((adapters[-1] / "adapter.txt").read_text())
            for i in range(4):
                suffix = (
                    f" * torch.tanh(m.abs() / m.abs().mean()) ** {i + 1 + 4 * iteration}"
                    + " * m.abs()" * (iteration + i)
                )
                texts[8 + i] = VARIATION.format(t=iteration, i=i, suffix=suffix) + f"# {learned}"
        written = []
        for done, (number, _) in enumerate(asked):
            tick(done, len(asked), "")
            written.append(
                Sample(tuple(range(number + 1)), texts[number], (0.0,) * number + (-float(number),), True)
            )
        return written

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def refine(
        self, taught: Taught, iteration: int, adapters: Sequence[Path], out: Path, tick: Any
    ) -> dict[str, Any]:
        tick(0, 1, "")
        out.mkdir(parents=True, exist_ok=True)
        tick(1, 2, "")
        (out / "adapter.txt").write_text(str(len(taught.pairs)))
        tick(2, 2, "")
        return {"pairs": len(taught.pairs)}


class Killer(Silent):
    """Ends the process with SIGKILL at a given report."""

    def __init__(self, kill_at: str):
        self.phase_name, _, number = kill_at.partition(":")
        self.left = int(number)

    @contextmanager
    def phase(self, name: str, arm: str | None = None, iteration: int | None = None) -> Iterator[Tick]:
        with super().phase(name, arm, iteration) as tick:
            yield _Counting(self, tick) if name == self.phase_name else tick

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Stopper(Killer):
    """Stops the run at a given report as Ctrl-C does."""

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class _Counting(Tick):
    def __init__(self, killer: Killer, tick: Tick):
        self.killer, self.tick = killer, tick
        super().__init__()

    def __call__(self, done: int, total: int, note: str) -> None:
        self.killer.count()


def scripted_config(**changes: Any) -> Config:
    """A small run on the real nano zoo."""
    return parse_config(
        {
            "name": "scripted",
            "iterations": 2,
            "programs": len(PROGRAMS),
            "factory": {"model": "scripted"},
            "prompt": {"form": "short"},
            "merge": {
                "seed": "zoo:nano/seed",
                "experts": {name: f"zoo:nano/{name}" for name in ("add", "sub", "sum", "max")},
            },
            "task": {"name": "nano", "development": 120, "test": 240},
            "preferences": {
                "chosen_floor": 2,
                "failures_as_rejected": True,
                "copies_as_rejected": True,
                "pairs": 8,
                "repairs": 8,
            },
            # A race is over programs as they were written.
            "scaling": {"norm": None if changes.get("race") else 1.5, "programs": 2, "factors": [0.5, 2.0]},
            "rivals": ["task_arithmetic", "weighted_task_arithmetic"],
            "jail": {"wall_seconds": 1.0},
        }
        | changes,
        "scripted",
    )


def writer_config(model: Path, **changes: Any) -> Config:
    """A small run whose factory is a real transformer."""
    return scripted_config(
        programs=20,
        factory={"model": str(model), "temperature": 1.0, "max_new_tokens": 120, "batch": 8},
        prompt={"form": "short", "names": ["vote"]},
        refinement={
            "rank": 8,
            "learning_rate": 2e-2,
            "epochs": 3,
            "beta": 0.1,
            "supervised": 0.5,
            "refit": "fresh",
        },
        rivals=["task_arithmetic"],
        **changes,
    )


def begin_or_resume(folder: Path, kill_at: str | None = None, model: Path | None = None) -> Run:
    watch = Killer(kill_at) if kill_at else None
    factory = ScriptedFactory() if model is None else None
    if (folder / "archive.db").exists():
        return resume(folder, factory=factory, watch=watch)
    config = scripted_config() if model is None else writer_config(model)
    return run(config, folder, factory=factory, watch=watch)


def killed(folder: Path, kill_at: str, model: Path | None = None) -> None:
    """Begin or resume a run in a process of its own that dies there."""
    command = [sys.executable, __file__, folder, kill_at, *([] if model is None else [model])]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(command, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    begun = (folder / "archive.db").exists()  # not before the factory is prepared
    assert not begun or open_run(folder).archive.run.status != "done"


if __name__ == "__main__":
    begin_or_resume(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None)
