"""What a merge is asked to do, in the words of the command line, and those words read into values."""

import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from selfdev.algorithms.library.specification import unknown_name
from selfdev.errors import UserError
from selfdev.merging.vocabulary import Embeddings

Dtype = Literal["bf16", "fp16", "fp32"]
"""Types that merged tensors can be written in."""

TORCH_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""What torch and mergekit call these."""

NAMES_IN_TORCH = {ours: name for name, ours in TORCH_DTYPES.items()}


class Schedule(Protocol):
    """Parameters of a method of the library that differ from tensor to tensor, by a file."""

    @property
    def file(self) -> Path:
        """Where they stand."""
        ...

    @property
    def text(self) -> str:
        """What the file held when it was read."""
        ...

    def check(self, names: Collection[str], layers: int) -> None:
        """Raise UserError unless the file fits a model of so many layers, of which these tensors are merged."""
        ...

    def parameters(self, name: str, layers: int) -> dict[str, Any]:
        """The parameters for a tensor of a model of so many layers."""
        ...


_EXPERT_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Recipe:
    """One merge.

    Attributes:
        method: a method of the library, `FILE.py`, or `RUN:CANDIDATE`.
        seed: where the seed comes from, as `selfdev.models.sources.resolve` takes it.
        experts: where the experts come from, by name, as `locate` takes them.
        parameters: of the method.
        targets: which tensors are merged; None leaves it to the method: what its run merged, or the MLP layers.
        dtype: in which all floating-point tensors are written; None keeps each as the seed stores it.
        embeddings: what to do where vocabularies differ; None refuses such experts.
        trust: run `FILE.py` in this process, with all rights of the user, instead of in the jail.
        tokenizer: the model whose tokenizer is written, by an expert's name or a source, or `union` for one that all
            share; None for the seed's.
        schedule: the parameters, in the place of `parameters`, where a file gives them.
    """

    method: str
    seed: str
    experts: Mapping[str, str]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    targets: str | None = None
    dtype: str | None = None
    embeddings: str | None = None
    trust: bool = False
    tokenizer: str | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        """Take a type's name in torch too."""
        object.__setattr__(self, "dtype", TORCH_DTYPES.get(self.dtype or "", self.dtype))

    def check(self) -> None:
        """Raise UserError if something is asked for that does not exist."""
        if not self.experts:
            raise UserError("there is no expert to merge; name at least one with --expert NAME=MODEL")
        for option, value, known in (
            ("dtype", self.dtype, get_args(Dtype)),
            ("embeddings", self.embeddings, get_args(Embeddings)),
        ):
            if value is not None and value not in known:
                raise UserError(unknown_name(option, str(value), list(known)))

    def command(self, targets: str) -> str:
        """The command line that does the same again, with `--out` left to the reader.

        Args:
            targets: that were merged.
        """
        if self.schedule is not None:
            words = ["selfdev", "merge", "--config", str(self.schedule.file)]
            words += ["--embeddings", self.embeddings] if self.embeddings else []
            return shlex.join([*words, "--out", "DIR"])
        words = ["selfdev", "merge", "--method", self.method, "--seed", self.seed]
        for name, source in self.experts.items():
            words += ["--expert", f"{name}={source}"]
        for name, value in self.parameters.items():
            words += ["-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        words += ["--targets", targets]
        for option, given in (
            ("--dtype", self.dtype),
            ("--embeddings", self.embeddings),
            ("--tokenizer", self.tokenizer),
        ):
            words += [option, given] if given else []
        return shlex.join([*words, *(["--trust"] if self.trust else []), "--out", "DIR"])


def read_experts(words: Sequence[str]) -> dict[str, str]:
    """Sources of experts by name, from words like `math=./my-model`, in the order given.

    Raises:
        UserError: a word that is not of this form, or a name that is given twice.
    """
    experts: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not equals or not source or not _EXPERT_NAME.fullmatch(name):
            raise UserError(
                f"expert '{word}' is not of the form NAME=MODEL; write for instance math=./my-model"
            )
        if name in experts:
            raise UserError(f"two experts are called '{name}'; give each a name of its own")
        experts[name] = source
    return experts


def read_parameters(words: Sequence[str]) -> dict[str, Any]:
    """Values of a method's parameters, from words like `density=0.3`, `weights=0.5,0.2` or `normalize=true`.

    Raises:
        UserError: a word that is not of the form KEY=VALUE, or a key that is given twice.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name or not text:
            raise UserError(
                f"parameter '{word}' is not of the form KEY=VALUE; write for instance density=0.3"
            )
        if name in values:
            raise UserError(f"parameter '{name}' is given twice; give it once")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    if "," in text and not text.startswith("["):
        return [_value(part.strip()) for part in text.split(",")]
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except (ValueError, RecursionError):
        return text
