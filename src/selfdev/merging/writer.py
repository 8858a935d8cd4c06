"""Writes tensors into safetensors files in transformers' layout, one after the other, while others are computed.

Every byte is hashed on its way out, and what the disk then holds is compared with what is still in memory, a little
behind the place of writing. The page in which two compared pieces meet may come from the system's cache.
"""

import errno
import hashlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from selfdev.errors import SelfdevError
from selfdev.merging.reader import INDEX
from selfdev.models.weights import TYPES

SHARD_BYTES = 5_000_000_000
"""Largest file, in bytes, unless one tensor is larger; what the Hub advises."""

_PIECE = 32 << 20
"""Bytes that are compared with the disk at a time."""

_BEHIND = 2
"""Pieces that may wait for their comparison. Each is held in memory, with the tensors that it is of."""

_READ = 1 << 20

_WAITING = 128 << 20
"""Bytes that may wait to be written, unless one tensor has more. They are held in memory."""


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

    def __init__(
        self,
        folder: Path,
        planned: Sequence[Planned],
        shard_bytes: int = SHARD_BYTES,
        *,
        passing: bool = False,
    ):
        """Write nothing yet.

        Args:
            folder: exists, and holds no weights.
            planned: all tensors, in the order in which they will be put.
            shard_bytes: largest file.
            passing: whether the system's cache is to forget what is written.
        """
        self._folder = folder
        self._passing = passing
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
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._verifier = ThreadPoolExecutor(1, thread_name_prefix="verifier")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._verifier.shutdown(cancel_futures=True)
        if self._file is not None:
            with suppress(OSError):  # the file goes, and why it goes is told already
                self._file.close()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which must not change any more.

        Args:
            name: the next one of the plan.
            tensor: on the CPU; its bytes are written as they are.

        Raises:
            SelfdevError: an earlier tensor could not be written, or reads back differently.
        """
        size = self._sizes[name]
        while self._waiting and sum(each for each, _ in self._waiting) + size > _WAITING:
            self._settle()
        self._waiting.append((size, self._thread.submit(self._write, name, tensor)))

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
            self._waiting.popleft()[1].result()
        except OSError as error:
            raise SelfdevError(write_failure(error, self._folder)) from error

    def _write(self, name: str, tensor: Tensor) -> None:
        if self._file is None:
            file, shard = self._shards.popleft()
            self._left.extend(shard)
            self._file = _File(self._folder / file, _header(shard), self._verifier, self._passing)
        planned = self._left.popleft()
        data = _bytes(tensor)
        assert (planned.name, planned.size) == (name, data.nbytes), (
            f"{name} is not what was planned: {planned}"
        )
        self._file.append(data)
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
    """One file that grows, is flushed piece by piece, and is compared with memory behind the place of writing."""

    def __init__(self, path: Path, header: bytes, verifier: ThreadPoolExecutor, passing: bool):
        self.path = path
        self._passing = passing
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        self._sha = hashlib.sha256()
        self._written = 0
        self._piece: list[memoryview] = []
        self._verifier = verifier
        self._verifying: deque[Future[None]] = deque()
        self.append(memoryview(header))

    def append(self, data: memoryview) -> None:
        """Write bytes, which must not change; wait for the disk where it is far behind."""
        for start in range(0, data.nbytes, _PIECE):
            part = data[start : start + _PIECE]
            self._sha.update(part)
            done = 0
            while done < part.nbytes:
                done += os.write(self._descriptor, part[done:])
            self._written += part.nbytes
            self._piece.append(part)
            if sum(each.nbytes for each in self._piece) >= _PIECE:
                self._hand_over()

    def finish(self) -> str:
        """The file's sha256.

        Raises:
            SelfdevError: the disk holds something else than what was written.
        """
        self._hand_over()
        while self._verifying:
            self._verifying.popleft().result()
        if os.fstat(self._descriptor).st_size != self._written:
            self._refuse()
        self.close()
        return self._sha.hexdigest()

    def close(self) -> None:
        """Give the descriptor back. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _hand_over(self) -> None:
        while len(self._verifying) >= _BEHIND:
            self._verifying.popleft().result()
        self._verifying.append(self._verifier.submit(self._verify, self._piece, self._written))
        self._piece = []

    def _verify(self, piece: list[memoryview], end: int) -> None:
        """Compare what lies in the file up to byte `end` with what was written there."""
        begin = end - sum(each.nbytes for each in piece)
        os.fdatasync(self._descriptor)
        # Out of the cache, so that the disk is asked.
        os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(_READ))
        for meant in piece:
            while meant.nbytes:
                count = os.preadv(self._descriptor, [buffer[: meant.nbytes]], begin)
                if not count or not _equal(buffer[:count], meant[:count]):
                    self._refuse()
                meant, begin = meant[count:], begin + count
        if self._passing:
            os.posix_fadvise(self._descriptor, 0, end, os.POSIX_FADV_DONTNEED)

    def _refuse(self) -> NoReturn:
        raise SelfdevError(
            f"'{self.path.name}' reads back from the disk differently than it was written; nothing of it is kept. "
            "Examine the disk, or choose an --out on another"
        )


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


def _equal(one: memoryview, other: memoryview) -> bool:
    """Whether the bytes are the same. NumPy lets other threads run meanwhile, eight bytes at a time."""
    whole = one.nbytes // 8 * 8
    mine, theirs = (np.frombuffer(each[:whole], np.uint64) for each in (one, other))
    return np.array_equal(mine, theirs) and one[whole:] == other[whole:]
