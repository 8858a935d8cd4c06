"""Input files are hashed a little ahead of the merge, which thus finds its tensors in the system's cache."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from selfdev.models.digest import FileDigest

_WINDOW = 128 << 20
"""Bytes that may lie read and unused. They are the system's, not this process's."""

Span = tuple[Path, int, int]
"""A part of a file: path, first byte, byte behind the last one."""


class ReadAhead:
    """Walks through steps, each of which needs parts of files; `with ReadAhead(...) as ahead`."""

    def __init__(
        self,
        files: Iterable[Path],
        steps: Sequence[Sequence[Span]],
        begun: Mapping[Path, FileDigest] | None = None,
    ):
        """Start nothing yet.

        Args:
            files: all that are to be hashed.
            steps: what each needs, in the order in which they come. Other files than these are left alone.
            begun: digests of files among them that go on from where they are.
        """
        self._digests = {path: (begun or {}).get(path) or FileDigest(path) for path in files}
        self._waiting = deque(steps)
        self._running: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0
        # One thread: hashing takes a core, and two files at once make a disk seek.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def next(self) -> None:
        """Wait until the next step's parts are read, while those of the ones after it are on their way."""
        while self._waiting and (self._bytes < _WINDOW or not self._running):
            spans = self._waiting.popleft()
            size = sum(end - begin for _, begin, end in spans)
            self._bytes += size
            self._running.append((size, self._thread.submit(self._read, spans)))
        size, reading = self._running.popleft()
        reading.result()
        self._bytes -= size

    def digests(self) -> dict[Path, str]:
        """The sha256 of every file, read to its end."""
        hashes = self._thread.map(FileDigest.finish, self._digests.values())
        return dict(zip(self._digests, hashes, strict=True))

    def _read(self, spans: Sequence[Span]) -> None:
        for path, begin, end in spans:
            if path in self._digests:
                self._digests[path].advance(begin, end)
