"""Writes tensors into safetensors files in transformers' layout, one after the other, while others are computed.

Every byte is hashed on its way out, then read back from the disk and hashed again: what is kept is what was meant.
"""

import errno
import hashlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from selfdev.errors import SelfdevError
from selfdev.merging.reader import INDEX
from selfdev.models.weights import TYPES

SHARD_BYTES = 5_000_000_000
"""Largest file, in bytes, unless one tensor is larger; what the Hub advises."""

_PIECE = 64 << 20
_READ = 4 << 20
_AHEAD = 2
"""Tensors that may wait to be written. Each is held in memory."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        name: of the tensor.
        dtype: as safetensors names it.
        shape: of the tensor.
        size: in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...]) -> "Planned":
        """A tensor of a type that torch knows."""
        return cls(name, dtype, shape, math.prod(shape) * TYPES[dtype].itemsize)


class Writer:
    """Writes the files of a model's weights into a folder; `with Writer(...) as writer`.

    The whole layout is known from the start, so that no tensor has to wait for another.
    """

    def __init__(self, folder: Path, planned: Sequence[Planned], shard_bytes: int = SHARD_BYTES):
        """Write nothing yet.

        Args:
            folder: exists, and holds no weights.
            planned: all tensors, in the order in which they will be put.
            shard_bytes: largest file.
        """
        self._folder = folder
        shards = list(_shards(planned, shard_bytes))
        names = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        )
        self._shards = deque(zip(names, shards, strict=True))
        self._index = {each.name: name for name, shard in self._shards for each in shard}
        self._sizes = {each.name: each.size for each in planned}
        self._left = deque[Planned]()
        self._file: _File | None = None
        self._digests: dict[str, str] = {}
        self._waiting: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._file is not None:
            with suppress(OSError):  # the file goes, and why it goes is told already
                self._file.close()

    def put(self, name: str, tensor: Tensor, then: Callable[[], None]) -> None:
        """Write the next tensor, which must not change any more.

        Args:
            name: the next one of the plan.
            tensor: on the CPU; its bytes are written as they are.
            then: called once it is written.

        Raises:
            SelfdevError: an earlier tensor could not be written, or reads back differently.
        """
        while len(self._waiting) >= _AHEAD:
            self._settle()
        self._waiting.append(self._thread.submit(self._write, name, tensor, then))

    def finish(self) -> dict[str, str]:
        """Wait until all is on the disk and verified, and write the index if there are several files.

        Returns:
            The sha256 of each file, by its name.

        Raises:
            SelfdevError: as for `put`.
        """
        while self._waiting:
            self._settle()
        assert self._file is None, "a planned tensor was not put"
        if len(self._digests) > 1:
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": self._index}
            try:
                (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            except OSError as error:
                raise SelfdevError(write_failure(error, self._folder)) from error
        return dict(self._digests)

    def _settle(self) -> None:
        try:
            self._waiting.popleft().result()
        except OSError as error:
            raise SelfdevError(write_failure(error, self._folder)) from error

    def _write(self, name: str, tensor: Tensor, then: Callable[[], None]) -> None:
        if self._file is None:
            file, shard = self._shards.popleft()
            self._left.extend(shard)
            self._file = _File(self._folder / file, _header(shard))
        planned = self._left.popleft()
        data = _bytes(tensor)
        assert (planned.name, planned.size) == (name, data.nbytes), (
            f"{name} is not what was planned: {planned}"
        )
        self._file.append(data)
        then()
        if not self._left:
            self._digests[self._file.path.name] = self._file.finish()
            self._file = None


def write_failure(error: OSError, folder: Path) -> str:
    """What to tell the user of a failed write into a folder that vanishes, beside the one asked for."""
    where = folder.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"'{where}' has no room for the merged model ({error.strerror})"
        return f"{reason}; nothing of it is kept. Make room, or choose another --out"
    if error.errno == errno.EFBIG:
        reason = f"'{where}' takes no file of the size that the merged model needs ({error.strerror})"
        return f"{reason}; nothing of it is kept. Raise the limit (ulimit -f), or choose another --out"
    return f"the merged model cannot be written into '{where}': {error}; nothing of it is kept. Choose another --out"


class _File:
    """One file that grows, is flushed piece by piece, and is read back behind the place of writing."""

    def __init__(self, path: Path, header: bytes):
        self.path = path
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        self._written, self._verified = 0, 0
        self._meant, self._found = hashlib.sha256(), hashlib.sha256()
        self.append(memoryview(header))

    def append(self, data: memoryview) -> None:
        """Write bytes; every so often wait until the disk has them."""
        for start in range(0, data.nbytes, _PIECE):
            piece = data[start : start + _PIECE]
            self._meant.update(piece)
            done = 0
            while done < piece.nbytes:
                done += os.write(self._descriptor, piece[done:])
            self._written += piece.nbytes
            if self._written - self._verified >= _PIECE:
                self._verify()

    def finish(self) -> str:
        """The file's sha256.

        Raises:
            SelfdevError: the disk holds something else than what was written.
        """
        self._verify()
        whole = os.fstat(self._descriptor).st_size == self._written
        self.close()
        if not whole or self._found.digest() != self._meant.digest():
            raise SelfdevError(
                f"'{self.path.name}' reads back from the disk differently than it was written; nothing of it is kept. "
                "Examine the disk, or choose an --out on another"
            )
        return self._meant.hexdigest()

    def close(self) -> None:
        """Give the descriptor back. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _verify(self) -> None:
        os.fdatasync(self._descriptor)
        # Out of the cache, so that the disk is asked.
        os.posix_fadvise(
            self._descriptor, self._verified, self._written - self._verified, os.POSIX_FADV_DONTNEED
        )
        while piece := os.pread(self._descriptor, min(_READ, self._written - self._verified), self._verified):
            self._found.update(piece)
            self._verified += len(piece)


def _shards(planned: Sequence[Planned], largest: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for each in planned:
        if shard and sum(other.size for other in shard) + each.size > largest:
            yield shard
            shard = []
        shard.append(each)
    yield shard


def _header(shard: Sequence[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in shard:
        entries[each.name] = {
            "dtype": each.dtype,
            "shape": each.shape,
            "data_offsets": [end, end + each.size],
        }
        end += each.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors then begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
