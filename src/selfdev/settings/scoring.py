"""What is merged, the questions that decide, and how they are spent."""

import re
from typing import Annotated

from pydantic import Field, field_validator

from selfdev.sandbox import Limits
from selfdev.settings.section import Device, Dtype, Section


class Merge(Section):
    """What is merged."""

    seed: str = Field(description="M0: where its weights come from.")
    experts: dict[str, str] = Field(
        min_length=2, description="Name of each expert, and where its weights come from."
    )
    targets: str = Field("mlp", description="Which tensors: mlp, attention, all, or a regular expression.")

    @field_validator("targets")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"'{value}' is no regular expression: {error}; use mlp, attention, all or another one"
            ) from None
        return value


class TaskSettings(Section):
    """The questions that decide."""

    name: str = Field(description="A built-in task, gsm8k:FOLDER, or a YAML file; see docs/tasks.md.")
    development: int = Field(100, ge=1, description="Questions of the development split.")
    test: int = Field(1000, ge=1, description="Questions of the test split, which the verdict opens once.")
    device: Device = Field(
        "auto", description="Where merged models answer; `auto`: CUDA's GPU if there is one, else the CPU."
    )
    dtype: Dtype = Field(
        "float32", description="Type of their weights then. On most CPUs only float32 is fast."
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Weight of a group in the score; 1 for groups that are not named."
    )
    floors: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(
        {}, description="Points that may be lost on a group against the seed; who loses more may not win."
    )


class Race(Section):
    """How the new programs of an iteration race; see `evaluation/race.py`."""

    first: int = Field(60, ge=1, description="Questions that every program answers.")
    growth: float = Field(1.2, gt=1, description="How many times as many it is from one look to the next.")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="Probability at which one of the best may leave early."
    )


class Scaling(Section):
    """A program is what it is up to a factor, so its scale is tuned, as that of every rival is; off in the paper."""

    norm: float | None = Field(
        None,
        gt=0,
        description="Every new program is scored as it was written and once more with its merged task vector brought "
        "to this norm, in norms of the mean task vector; `null`: only as written.",
    )
    programs: int = Field(
        0, ge=0, description="Best new programs of each arm that are tuned before the verdict; 0 tunes none."
    )
    factors: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 0.7, 1.4, 2.0), description="What the scale at which a program is best so far is multiplied by."
    )


class Verdict(Section):
    """The final test."""

    finalists: int = Field(
        15, ge=1, description="Discovered programs measured on test, best on development first."
    )
    level: float = Field(0.95, gt=0, lt=1, description="Of every interval.")


class Jail(Section):
    """Limits of one jailed program."""

    wall_seconds: float = Field(10.0, ge=0.1, le=3600, description="Until it is killed.")
    memory_mb: int = Field(1024, ge=64, description="Above what the bare process takes, in MB.")
    workers: int = Field(
        1,
        ge=1,
        description="Processes in which a program merges tensors at once, a core and `memory_mb` for each. They change "
        "the time alone. Up to 32 tensors share a process, while they take less than 64 MB. Of runs and transfers; a "
        "merge runs a program in one.",
    )

    @property
    def limits(self) -> Limits:
        """As the jail takes them."""
        return Limits(
            wall_seconds=self.wall_seconds,
            cpu_seconds=2 * self.wall_seconds + 1,  # never first: one loop, one class of failure
            memory_bytes=self.memory_mb * 1000**2,
        )
