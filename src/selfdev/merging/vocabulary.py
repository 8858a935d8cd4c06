"""Embeddings and output heads: which of them are merged, how many rows, and what is tied to what.

A model that ties its output head to its embeddings stores one tensor or both; its relatives need not do as it does,
and need not have as many tokens.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from selfdev.errors import UserError
from selfdev.merging.reader import Checkpoint
from selfdev.merging.targets import embeddings_of, head_of, of_vocabulary

_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
_NOT_READ = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)

_log = logging.getLogger(__name__)

Embeddings = Literal["seed", "crop"]
"""What to do where vocabularies differ: keep the seed's rows, or merge the rows that all models have."""


@dataclass(frozen=True)
class Settled:
    """What is merged once vocabularies are settled.

    Attributes:
        chosen: names of the tensors to merge, in the order given.
        rows: of the tensors among them that are merged in part, how many first rows.
        dropped: a tensor of the seed that is not written, since it repeats the one it is tied to.
        ignored: tensors that experts may have beyond the seed's.
    """

    chosen: list[str]
    rows: dict[str, int]
    dropped: str | None
    ignored: list[str]


def settle(
    seed: Checkpoint, experts: Sequence[Checkpoint], chosen: Sequence[str], embeddings: str | None
) -> Settled:
    """Settle which rows of embeddings and output head are merged.

    Experts that tie a head which the seed stores are given one by its name.

    Args:
        seed: the seed.
        experts: its relatives.
        chosen: names of the seed's tensors that are to be merged.
        embeddings: one of `Embeddings`; None refuses vocabularies that differ.

    Raises:
        UserError: vocabularies or heads do not match; the message says how to go on.
    """
    dropped = _repeated_head(seed)
    chosen = [name for name in chosen if name != dropped]
    if embeddings == "seed":
        heads = [head for expert in experts if (head := head_of(expert.shapes))]
        return Settled([name for name in chosen if not of_vocabulary(name)], {}, dropped, heads)
    ignored: list[str] = []
    merged = [name for name in chosen if of_vocabulary(name)]
    if merged:
        for expert in experts:
            ignored += _matched_head(seed, expert, dropped)
        rows = _common_rows(seed, experts, merged, crop=embeddings == "crop")
        for expert in experts:
            _check_tokens(expert, seed, min([*rows.values(), *(seed.shapes[name][0] for name in merged)]))
    else:
        rows = {}
    return Settled(chosen, rows, dropped, ignored)


def _repeated_head(seed: Checkpoint) -> str | None:
    """The seed's stored head, if it is the embeddings once more and the config ties them."""
    head, table = head_of(seed.shapes), embeddings_of(seed.shapes)
    if head is None or table is None or not _ties(seed):
        return None
    return head if _equal(seed, head, table) else None


def _matched_head(seed: Checkpoint, expert: Checkpoint, dropped: str | None) -> list[str]:
    """Bring an expert's head in line with the seed's; returns the name of one that is to be ignored."""
    ours = None if dropped else head_of(seed.shapes)
    theirs, table = head_of(expert.shapes), embeddings_of(expert.shapes)
    if ours is not None and theirs is None and table is not None and _ties(expert):
        expert.alias(ours, table)
    if ours is not None or theirs is None:
        return []
    if table is not None and _equal(expert, theirs, table):
        return [theirs]
    raise UserError(
        f"{expert.owner}: its output head '{theirs}' differs from its embeddings, and the seed ties the two; "
        "--embeddings seed keeps the seed's and merges all else, or choose targets without the embeddings"
    )


def _ties(model: Checkpoint) -> bool:
    """Whether a model's output head is its embeddings, by its config or, if that says nothing, its architecture."""
    if (said := model.config.get("tie_word_embeddings")) is not None:
        return bool(said)
    from transformers import AutoConfig  # late: few configs leave it out, and the import takes a moment

    try:
        return bool(AutoConfig.for_model(model.config["model_type"]).tie_word_embeddings)
    except (KeyError, ValueError, AttributeError):  # an architecture that transformers does not know
        return False


def _equal(model: Checkpoint, one: str, other: str) -> bool:
    if model.shapes[one] != model.shapes[other] or model.types[one] != model.types[other]:
        return False
    equal = torch.equal(model.tensor(one), model.tensor(other))
    model.release(one)
    model.release(other)
    return equal


def _common_rows(
    seed: Checkpoint, experts: Sequence[Checkpoint], names: Sequence[str], *, crop: bool
) -> dict[str, int]:
    """How many rows of each tensor are merged, where it is not all of the seed's in every model."""
    rows = {}
    for name in names:
        having = [expert for expert in experts if name in expert.shapes]
        for expert in having:
            theirs, ours = expert.shapes[name], seed.shapes[name]
            if theirs[:1] != ours[:1] and theirs[1:] == ours[1:] and not crop:
                raise UserError(
                    f"{expert.owner}: its '{name}' has {theirs[0]} rows and the seed's has {ours[0]}, since their "
                    f"vocabularies differ; --embeddings seed keeps the seed's, --embeddings crop merges the first "
                    f"{min(theirs[0], ours[0])} rows and keeps the rest"
                )
        common = min([seed.shapes[name][0], *(expert.shapes[name][0] for expert in having)])
        if any(expert.shapes[name][0] != common for expert in having) or seed.shapes[name][0] != common:
            rows[name] = common
    return rows


def _check_tokens(expert: Checkpoint, seed: Checkpoint, rows: int) -> None:
    """Raise UserError if one of the first rows is another token's in the expert; say so where nobody can know.

    Tokens that were added to the tokenizer's own are merged and told of: fine-tuning renames reserved ones.
    """
    if all(_text(seed.folder / file) == _text(expert.folder / file) for file in _TOKENIZERS):
        return
    ours, theirs = _tokens(seed.folder), _tokens(expert.folder)
    if not ours or not theirs:
        _log.warning(
            "%s: no tokenizer.json or vocab.json of its own and the seed's tells which token a row of the embeddings "
            "is for; they are merged row by row",
            expert.owner,
        )
        return
    differ = _apart(ours, theirs, rows)
    if differ:
        first = differ[0]
        raise UserError(
            f"{expert.owner}: its tokenizer has another token in {len(differ)} rows of the embeddings (row {first}: "
            f"{theirs[first]!r}, the seed's {ours[first]!r}); --embeddings seed keeps the seed's embeddings and "
            "merges all else"
        )
    ours, theirs = _added(seed.folder), _added(expert.folder)
    differ = _apart(ours, theirs, rows)
    if differ:
        first = differ[0]
        _log.warning(
            "%s: %d added tokens have other names than the seed's (row %d: %r, the seed's %r); they are merged row by "
            "row. --embeddings seed keeps the seed's embeddings",
            *(expert.owner, len(differ), first, theirs[first], ours[first]),
        )


def _apart(ours: Mapping[int, str], theirs: Mapping[int, str], rows: int) -> list[int]:
    """The first rows that both have, for different tokens."""
    return [i for i in sorted(ours.keys() & theirs.keys()) if i < rows and ours[i] != theirs[i]]


def check_same_tokens(owner: str, folder: Path, seed: Checkpoint) -> None:
    """Raise UserError unless a model's tokenizer has the seed's tokens, added ones too, each in the seed's row.

    Args:
        owner: whose it is, as the user's messages say it.
        folder: of the model.
        seed: the seed.
    """
    if _text(seed.folder / "tokenizer.json") == _text(folder / "tokenizer.json") != b"":
        return
    ours, theirs = ({**_tokens(each), **_added(each)} for each in (seed.folder, folder))
    differ = sorted(row for row in ours.keys() | theirs.keys() if ours.get(row) != theirs.get(row))
    if differ or not ours:
        raise UserError(
            f"{owner}: it has another token than the seed in {len(differ) or 'unknown'} rows; tokenizers that differ "
            "are not united here. Keep the seed's (tokenizer_source: base), or merge with mergekit"
        )


def _text(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _added(folder: Path) -> Mapping[int, str]:
    """The tokens that were added to the tokenizer's own, by row, as far as `tokenizer.json` tells them."""
    try:
        added = json.loads(_text(folder / "tokenizer.json"))["added_tokens"]
        return {int(each["id"]): str(each["content"]) for each in added}
    except _NOT_READ:
        return {}


def _tokens(folder: Path) -> Mapping[int, str]:
    """The tokenizer's own vocabulary by row; empty where neither `tokenizer.json` nor `vocab.json` tells it."""
    try:
        vocabulary = json.loads(_text(folder / "tokenizer.json"))["model"]["vocab"]
    except _NOT_READ:
        try:
            vocabulary = json.loads(_text(folder / "vocab.json"))
        except _NOT_READ:
            return {}
    try:
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            return {row: str(pair[0]) for row, pair in enumerate(vocabulary)}
        return {int(row): str(token) for token, row in vocabulary.items()}
    except _NOT_READ:
        return {}
