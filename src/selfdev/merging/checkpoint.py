"""Merges real checkpoints, tensor by tensor, from disk to disk.

Whatever the models' size, what lies in memory is one large tensor or a few small ones (`stream.py`): the task vectors
and the seed's tensor in float32, or parts of them where the method allows it, what the algorithm makes of them, and
results that wait to be written or to be compared with what the disk holds. Inputs are memory-mapped; they are hashed a
little ahead of the merge and released behind it.

The folder is written aside under a name that begins with a dot and renamed once it is complete and verified. A merge
that is interrupted or fails leaves nothing behind; one that is killed leaves the dot folder, whose config.json comes
last, and the next merge to the same folder removes it.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from selfdev.errors import SelfdevError, UserError
from selfdev.merging.algorithm import Algorithm
from selfdev.merging.aside import check_out, remove_left, written_aside
from selfdev.merging.head_start import HeadStart
from selfdev.merging.job import Job, prepare
from selfdev.merging.lookup import check_schedule, find
from selfdev.merging.model_card import Input, model_card
from selfdev.merging.read_ahead import ReadAhead
from selfdev.merging.recipe import NAMES_IN_TORCH, Dtype, Recipe
from selfdev.merging.stream import merged_tensors, spans_of, steps_of
from selfdev.merging.vocabulary import Embeddings
from selfdev.merging.writer import SHARD_BYTES, Writer, write_failure
from selfdev.models.adapter import CONFIG as ADAPTER_CONFIG
from selfdev.models.digest import FileDigest

_log = logging.getLogger(__name__)

# What lies beside the weights and belongs to the model: configs, tokenizer, chat template, licence. Code only with
# a config that names it.
_BESIDE = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "tokenizer*",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_CODE = ("*.py",)
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_NOT_BESIDE = (
    "*.index.json",
    "adapter_config.json",
    "trainer_state.json",
    "*_results.json",
    "requirements*.txt",
)


Tick = Callable[[int, int, str], None]


def _say_nothing(done: int, total: int, note: str) -> None:
    """Stands for a tick where nobody wants to know."""


@dataclass(frozen=True)
class Merged:
    """What came of a merge.

    Attributes:
        folder: of the merged model.
        merged: how many tensors were merged.
        tensors: how many the model has; those that were not merged are the seed's.
        targets: which were merged.
        seconds: that it took.
        hashes: sha256 of each file of weights, by its name.
    """

    folder: Path
    merged: int
    tensors: int
    targets: str
    seconds: float
    hashes: Mapping[str, str]

    def described(self) -> dict[str, Any]:
        """The same for programs."""
        return {**asdict(self), "folder": str(self.folder)}

    @property
    def summary(self) -> str:
        """One sentence."""
        rest = "" if self.merged == self.tensors else f" (targets {self.targets}; the others are the seed's)"
        return (
            f"merged {self.merged} of {self.tensors} tensors{rest} into {self.folder} in {self.seconds:.1f} s"
        )


def merge(
    method: str | Path,
    seed: str | Path,
    experts: Mapping[str, str | Path],
    /,
    *,
    out: str | Path,
    targets: str | None = None,
    dtype: Dtype | None = None,
    embeddings: Embeddings | None = None,
    trust: bool = False,
    tokenizer: str | Path | None = None,
    **parameters: Any,
) -> Merged:
    """Merge experts into a seed and write a folder that transformers loads.

        selfdev.merge("ties", "./seed", {"math": "./math", "code": "./lora"}, out="./merged", density=0.3)

    Args:
        method: a method of the library, `FILE.py` with `merge_models`, or `RUN:CANDIDATE`.
        seed: a folder, a GGUF file, a Hub name, or another source of `selfdev.models.sources`.
        experts: sources by name; LoRA adapters too.
        out: the folder to write, which must not exist or be empty.
        targets: which tensors: `mlp`, `attention`, `all` or a regular expression. By default what the candidate's
            run merged, and the MLP layers for other methods.
        dtype: `bf16`, `fp16` or `fp32` for all floating-point tensors; by default each as the seed stores it.
        embeddings: where vocabularies differ, `seed` keeps the seed's embeddings and output head, and `crop` merges
            the rows that all have; by default such experts are refused.
        trust: run a `FILE.py` of your own in this process instead of in the jail.
        tokenizer: of which model the tokenizer and chat template are written, by an expert's name or a source; it must
            have the seed's tokens. By default the seed's.
        **parameters: of the method.

    Raises:
        UserError: something cannot be merged as asked; nothing has been written.
        SelfdevError: the algorithm fails, or the folder cannot be written.
    """
    if not isinstance(experts, Mapping):
        raise UserError('experts are given with their names, as {"math": "./math", "code": "./code"}')
    sources = {name: str(source) for name, source in experts.items()}
    theirs = None if tokenizer is None else str(tokenizer)
    recipe = Recipe(
        str(method), str(seed), sources, parameters, targets, dtype, embeddings, trust, tokenizer=theirs
    )
    return merge_checkpoints(recipe, Path(out))


def merge_checkpoints(
    recipe: Recipe,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    tick: Tick = _say_nothing,
    ahead: HeadStart | None = None,
) -> Merged:
    """As `merge`, for a recipe.

    Args:
        recipe: what to merge, and how.
        out: the folder to write.
        shard_bytes: largest file of weights.
        tick: told how many bytes are merged, of how many, and the last tensor's name.
        ahead: what is hashing the recipe's models already.
    """
    began = time.perf_counter()
    recipe.check()
    found = find(recipe)
    out = Path(os.path.expanduser(out)).absolute()
    check_out(out)
    job = prepare(recipe, found.targets if recipe.targets is None else recipe.targets)
    check_schedule(recipe, sorted(job.chosen), job.layers)
    remove_left(out)
    job.check_room(out)
    with written_aside(out) as folder:
        with found.opened(len(job.experts), job.largest) as algorithm:
            written, inputs = _stream(job, algorithm, folder, shard_bytes, tick, ahead)
        with _reading():
            beside = _beside(job)
            inputs += _inputs_beside(recipe, job, beside)
        card = model_card(recipe, job.targets, job.counts, algorithm.origin, inputs)
        _write_beside(job, folder, beside, card)
    return Merged(out, *job.counts, job.targets, time.perf_counter() - began, written)


def _stream(
    job: Job, algorithm: Algorithm, folder: Path, shard_bytes: int, tick: Tick, begun: HeadStart | None
) -> tuple[dict[str, str], list[Input]]:
    """Merge and write all tensors; returns the hashes of what was written and of what was read."""
    models = [job.seed, *job.experts.values()]
    files = dict.fromkeys(file for model in models for file in model.files)
    steps = steps_of(job, algorithm.batch_bytes)
    planned = {name: job.planned(name) for name in job.order}
    done, total = 0, sum(each.size for each in planned.values())
    spans = [spans_of(job, step) for step in steps]
    with (
        ReadAhead(files, spans, begun.stop() if begun else {}) as ahead,
        Writer(folder, list(planned.values()), shard_bytes, passing=job.passing) as writer,
    ):
        for name, tensor in _told(merged_tensors(job, algorithm, steps, ahead)):
            writer.put(name, tensor)
            done += planned[name].size
            tick(done, total, name)
        written = writer.finish()
        with _reading():
            hashes = ahead.digests()
    _warn_of_equals(job, hashes)
    # No dict: an expert may be called `seed` too.
    named = [("seed", job.seed_source, job.seed)]
    named += [(name, job.sources[name], expert) for name, expert in job.experts.items()]
    return written, [
        Input(name, source, {**model.made_of(), **{file.name: hashes[file] for file in model.files}})
        for name, source, model in named
    ]


def _warn_of_equals(job: Job, hashes: Mapping[Path, str]) -> None:
    """Say which experts have the weights of the seed or of another one: mostly a slip, and it shifts every mean."""
    first: dict[tuple[str, ...], str] = {}
    for name, model in [
        ("the seed", job.seed),
        # Where the seed is named as one of the experts too, as SLERP wants it, that is no slip.
        *(
            (f"expert '{name}'", each)
            for name, each in job.experts.items()
            if job.sources[name] != job.seed_source or len(job.experts) == 1
        ),
    ]:
        # Not the index and the config, in which copies of one model may differ; an adapter's says how strong it is.
        weighing = [file for file in model.files if file.suffix != ".json" or file.name == ADAPTER_CONFIG]
        other = first.setdefault(tuple(hashes[file] for file in weighing), name)
        if other != name:
            _log.warning("%s has the weights of %s", name, other)


@contextmanager
def _reading() -> Iterator[None]:
    """Tells of what cannot be read."""
    try:
        yield
    except OSError as error:
        raise SelfdevError(
            f"the models cannot be read to their end, or handed to the algorithm: {error}; see that their files stay "
            "where they are, and that no limit (ulimit) is in the way"
        ) from error


def _told(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, under `_reading`."""
    with _reading():
        yield from tensors


def _beside(job: Job) -> dict[Path, Path]:
    """What is copied: the files beside the seed's weights, and the tokenizer's, by their place in the folder."""
    patterns = (*_BESIDE, *(_CODE if "auto_map" in job.seed.config else _code_of_tokenizer(job.seed.folder)))
    beside = _files(job.seed.folder, patterns)
    if job.tokenizer != job.seed.folder:
        theirs = _files(job.seed.folder, _TOKENIZER)
        beside = {name: path for name, path in beside.items() if name not in theirs}
        beside |= _files(job.tokenizer, (*_TOKENIZER, *_code_of_tokenizer(job.tokenizer)))
    return {
        name: path
        for name, path in sorted(beside.items())
        if path.name != "config.json" and not any(path.match(pattern) for pattern in _NOT_BESIDE)
    }


def _inputs_beside(recipe: Recipe, job: Job, beside: Mapping[Path, Path]) -> list[Input]:
    """The copied files as inputs of the seed and, where it is another's, of the tokenizer."""
    owners = {
        job.tokenizer: ("tokenizer", recipe.tokenizer or ""),
        job.seed.folder: ("seed", job.seed_source),
    }
    return [
        Input(
            *owner,
            {
                str(place): FileDigest(path).finish()
                for place, path in beside.items()
                if path == folder / place
            },
        )
        for folder, owner in owners.items()
    ]


def _write_beside(job: Job, folder: Path, beside: Mapping[Path, Path], card: str) -> None:
    """Write what makes weights a model: card, tokenizer and, last of all, the config."""
    config = dict(job.seed.config)
    if job.dtype is not None:
        config.pop("torch_dtype", None)  # what older versions called it
        config["dtype"] = NAMES_IN_TORCH[job.dtype]
    try:
        (folder / "README.md").write_text(
            card, errors="backslashreplace"
        )  # folders may have any bytes for a name
        for name, path in beside.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise SelfdevError(write_failure(error, folder)) from error


def _code_of_tokenizer(folder: Path) -> tuple[str, ...]:
    """What is copied too where a tokenizer is of a class of its own."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return ()
    return _CODE if isinstance(config, dict) and "auto_map" in config else ()


def _files(folder: Path, patterns: Iterable[str]) -> dict[Path, Path]:
    """Files of a folder by their place in it."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder): path for path in found}
