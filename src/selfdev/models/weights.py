"""Files of weights, memory-mapped: safetensors, and torch's own format through its weights-only loader.

A tensor is a view of the mapped file: nothing is read before it is used, and `release` gives the pages back, so
that a file of any size takes as much memory as the tensors in use. Views must not be written to.

safetensors' headers are parsed here, since the library's reader tells no offsets, and copies what it reads.
"""

import ctypes
import json
import math
import mmap
import os
import pickle
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the names that safetensors gives them."""

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_METADATA = "__metadata__"


class Damaged(ValueError):
    """A file of weights cannot be read; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A tensor as it is stored.

    Attributes:
        dtype: as safetensors names it; torch has those of `TYPES`.
        shape: of the tensor.
        begin: byte of the file at which it begins; equal to `end` where the format does not tell.
        end: byte behind its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class WeightFile:
    """The tensors of one file.

    Attributes:
        path: of the file.
        entries: its tensors by name.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file holds; no tensor yet.

        Args:
            path: `*.safetensors`, or anything else in the format of `torch.save`. The latter can hold any
                object; torch's loader admits tensors alone and refuses the rest. Files that torch wrote
                before version 1.6 cannot be mapped and are loaded whole.

        Raises:
            Damaged: the file is torn, of another format, or holds what is no tensor.
            OSError: it cannot be opened.
        """
        self.path = path
        self._flat: dict[str, Tensor] = {}
        if path.suffix == ".safetensors":
            self._mapped: bool = True
            self.entries, self._mapping = _safetensors(path)
            self._views: dict[str, Tensor] = {}
        else:
            self._mapped = zipfile.is_zipfile(path)
            self._views = _pickled(path, self._mapped)
            self.entries = {
                name: Entry(_NAMES[tensor.dtype], tuple(tensor.shape), 0, 0)
                for name, tensor in self._views.items()
            }

    def tensor(self, name: str) -> Tensor:
        """A view of a tensor, of the type in which it is stored, or its bytes if torch has no such type. Read only."""
        if name not in self._views:
            self._views[name] = self._view(name)
        return self._views[name]

    def flat(self, name: str) -> Tensor:
        """The same with one dimension; a copy where the tensor is not stored in the order of its entries."""
        if name not in self._flat:
            flat = self.tensor(name).flatten()
            if not self.tensor(name).is_contiguous():
                return flat
            self._flat[name] = flat
        return self._flat[name]

    def release(self, name: str) -> None:
        """Let go of the memory that a tensor's pages take; it can be read again."""
        if self._mapped:
            _forget(self.tensor(name))

    def forget(self, name: str, end: int | None = None) -> None:
        """Let the system's cache forget a released tensor up to an entry, or all of it; the disk has it.

        Only where the format tells its place.
        """
        entry = self.entries[name]
        size = entry.end - entry.begin
        if size and end is not None:
            size = min(size, end * TYPES[entry.dtype].itemsize)
        if size:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, entry.begin, size, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def _view(self, name: str) -> Tensor:
        entry = self.entries[name]
        shape = entry.shape if entry.dtype in TYPES else (entry.end - entry.begin,)
        dtype = TYPES.get(entry.dtype, torch.uint8)
        count = math.prod(shape)
        if count == 0:  # frombuffer refuses to view nothing
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            # That the mapping cannot be written to is as it should be. A writable private one would count as
            # memory, and a shard larger than the machine could not be mapped.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=entry.begin)
        return flat.view(shape)


def _safetensors(path: Path) -> tuple[dict[str, Entry], Any]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise Damaged(f"it has {len(prefix)} bytes, too few for a header")
        if prefix == b"version ":
            raise Damaged("it is a pointer of Git LFS, and `git lfs pull` fetches what it points to")
        (length,) = _LENGTH.unpack(prefix)
        start = _LENGTH.size + length
        if length > _LONGEST_HEADER or start > size:
            raise Damaged(f"its header claims {length} bytes and the file has {size}")
        try:
            header = json.loads(file.read(length))
            header.pop(_METADATA, None)
            entries = {name: _entry(described, start) for name, described in header.items()}
        except (
            *(ValueError, KeyError, TypeError, AttributeError),
            *(OverflowError, RecursionError),  # of an infinite extent, and of brackets without end
        ) as error:
            raise Damaged(f"its header is none of safetensors: {type(error).__name__}: {error}") from None
        for name, entry in entries.items():
            if not start <= entry.begin <= entry.end <= size:
                raise Damaged(f"tensor '{name}' ends at byte {entry.end} and the file has {size}")
        return entries, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _entry(described: Any, start: int) -> Entry:
    dtype, shape = described["dtype"], tuple(int(extent) for extent in described["shape"])
    begin, end = (start + int(offset) for offset in described["data_offsets"])
    if dtype not in TYPES:
        # Types of less than a byte, which quantised models use, are merged by nobody; their bytes are copied.
        return Entry(str(dtype), shape, begin, end)
    if min(shape, default=1) < 0 or end - begin != math.prod(shape) * TYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for {dtype} of shape {shape}")
    return Entry(dtype, shape, begin, end)


def _pickled(path: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch gives a page, which begins with how to open the file all the same; what is wrong stands before its end.
        said = [line.strip() for line in str(error).splitlines() if line.strip()][-2:-1]
        raise Damaged(
            f"it holds more than tensors, or is cut off, and to open it otherwise could run code ({''.join(said)}); "
            "take weights in safetensors"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Damaged(reason) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise Damaged("it holds something else than named tensors")
    for name, value in loaded.items():
        if value.is_nested or value.layout is not torch.strided or value.device.type != "cpu":
            raise Damaged(f"'{name}' is a tensor without the plain numbers of weights")
    unknown = {str(value.dtype) for value in loaded.values()} - {str(dtype) for dtype in _NAMES}
    if unknown:
        raise Damaged(f"it holds tensors of type {', '.join(sorted(unknown))}")
    return {name: value.detach() for name, value in loaded.items()}


_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _forget(tensor: Tensor) -> None:
    """Drop the whole pages that a view of a mapped file covers. They hold nothing that the file does not."""
    storage = tensor.untyped_storage()
    begin = tensor.data_ptr()
    end = min(begin + tensor.numel() * tensor.element_size(), storage.data_ptr() + storage.nbytes())
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        _madvise(first, length, mmap.MADV_DONTNEED)  # a courtesy: if it fails, memory is freed later
