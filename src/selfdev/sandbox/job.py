"""What passes between parent and child, and how it lies in the two files.

The job file, written by the parent (and sealed for the jail): the length of a JSON header (8 bytes), the
header, then the tensors, each at a multiple of 64 bytes. The result file, written by the child: one record for
each call, then room for one float32 tensor for each call. Both sides compute the places from the shapes;
nothing that the child writes says where or how large anything is.
"""

import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from .context import Context
from .tensor_file import TensorFile

READY = b"ready"
"""What a child says when its layers stand, before the source is looked at."""

EXIT_DONE = 0
"""Exit code of a child that has come to the end of its calls."""

_ALIGNMENT = 64
_LENGTH = struct.Struct("<Q")
_ITEM = 4  # bytes of a float32
_PIECE = 1 << 20  # numbers

# The chunk rule. Many small calls share a child, since a fork costs more than they do; large tensors get one
# each.
CHUNK_CALLS = 32
CHUNK_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Call:
    """One call of `merge_models`: task vectors (float32, CPU, contiguous, one shape), seed and context."""

    model_dict: Mapping[str, torch.Tensor]
    seed: int = 0
    context: Context | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of every task vector and of the result."""
        return tuple(next(iter(self.model_dict.values())).shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs and the output."""
        tensors = len(self.model_dict) + 1 + (self.context is not None)
        return tensors * math.prod(self.shape) * _ITEM


def chunks(calls: Sequence[Call]) -> Iterator[range]:
    """Split calls, in order, into the runs that share a child. Depends on their number and bytes only."""
    start, size = 0, 0
    for i, call in enumerate(calls):
        if i > start and (i - start == CHUNK_CALLS or size + call.nbytes > CHUNK_BYTES):
            yield range(start, i)
            start, size = i, 0
        size += call.nbytes
    if calls:
        yield range(start, len(calls))


def write_job(file: TensorFile, source: str, calls: Sequence[Call]) -> None:
    """Write source and calls into an empty file."""
    tensors: list[torch.Tensor] = []

    def place(tensor: torch.Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    header = {
        "source": source,
        "calls": [
            {
                "shape": call.shape,
                "seed": call.seed,
                "experts": [[name, place(tensor)] for name, tensor in call.model_dict.items()],
                "context": call.context
                and {
                    "seed": place(call.context.seed),
                    "name": call.context.name,
                    "layer": call.context.layer,
                    "layers": call.context.layers,
                },
            }
            for call in calls
        ],
    }
    text = json.dumps(header).encode()  # ASCII: a lone surrogate in a source travels as its escape
    offsets, size = _places(_LENGTH.size + len(text), (tensor.numel() for tensor in tensors))
    file.resize(size)
    file.write(_LENGTH.pack(len(text)) + text, 0)
    for tensor, offset in zip(tensors, offsets, strict=True):
        file.write_tensor(tensor, offset)


def read_job(mapping: memoryview) -> tuple[str, list[Call]]:
    """The source and the calls of a mapped job file; the tensors are views of the mapping."""
    (length,) = _LENGTH.unpack_from(mapping, 0)
    header = json.loads(bytes(mapping[_LENGTH.size : _LENGTH.size + length]))
    counts = [
        math.prod(call["shape"])
        for call in header["calls"]
        for _ in range(len(call["experts"]) + (call["context"] is not None))
    ]
    offsets, _ = _places(_LENGTH.size + length, counts)

    def tensor(index: int, shape: Sequence[int]) -> torch.Tensor:
        return view(mapping, offsets[index], shape)

    calls = []
    for call in header["calls"]:
        context = call["context"]
        if context is not None:
            context = Context(**{**context, "seed": tensor(context["seed"], call["shape"])})
        experts = {name: tensor(index, call["shape"]) for name, index in call["experts"]}
        calls.append(Call(experts, call["seed"], context))
    return header["source"], calls


class State(IntEnum):
    """How far a call came."""

    WAITING = 0
    RUNNING = 1
    DONE = 2


@dataclass(frozen=True)
class Record:
    """What the child says of one call. Written by a hostile process: to be believed of itself alone."""

    state: int
    status: str
    failure: str
    error: str
    seconds: float

    # state, seconds, status, failure, error (a character takes up to 4 bytes)
    _LAYOUT = struct.Struct("<B7xd16s64s1200s")
    SIZE = _LAYOUT.size

    def pack(self) -> bytes:
        """The record as ``SIZE`` bytes; texts are cut at theirs."""
        texts = (text.encode("utf-8", "replace") for text in (self.status, self.failure, self.error))
        return self._LAYOUT.pack(self.state, self.seconds, *texts)

    @classmethod
    def unpack(cls, data: bytes) -> "Record":
        """Read any ``SIZE`` bytes whatever."""
        state, seconds, *texts = cls._LAYOUT.unpack(data)
        status, failure, error = (text.rstrip(b"\0").decode("utf-8", "replace") for text in texts)
        return cls(state, status, failure, error, seconds)


@dataclass(frozen=True)
class ResultLayout:
    """Where the records and tensors of a result file lie.

    Attributes:
        shapes: of the tensors, one for each call.
        offsets: in bytes, of the tensors.
        size: in bytes, of the file.
    """

    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]]) -> "ResultLayout":
        """The layout for results of these shapes."""
        shapes = tuple(shapes)
        offsets, size = _places(len(shapes) * Record.SIZE, map(math.prod, shapes))
        return cls(shapes, tuple(offsets), size)


def view(mapping: memoryview, offset: int, shape: Sequence[int]) -> torch.Tensor:
    """A float32 tensor in the mapping's own memory."""
    count = math.prod(shape)
    if not count:  # frombuffer refuses to view nothing
        return torch.empty(tuple(shape))
    return torch.frombuffer(mapping, dtype=torch.float32, count=count, offset=offset).view(tuple(shape))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a contiguous tensor has neither NaN nor infinity.

    It looks at one piece after the other, since `torch.isfinite` takes twice the memory of what it is given.
    """
    pieces: tuple[torch.Tensor, ...] = torch.split(tensor.flatten(), _PIECE)
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)


def _places(start: int, counts: Iterable[int]) -> tuple[list[int], int]:
    """Byte offsets of float32 arrays of these lengths from ``start`` on, and the size of the whole."""
    ends = itertools.accumulate(
        counts, lambda end, count: _aligned(end) + count * _ITEM, initial=_aligned(start)
    )
    pairs = list(ends)
    return [_aligned(end) for end in pairs[:-1]], max(pairs[-1], 1)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
