"""The sha256 of a file, computed a part at a time, ahead of a reader of the same file.

Hashing reads every byte once and leaves it in the system's cache, where a reader that follows finds it: identity
and read-ahead come from one pass.
"""

import hashlib
import os
from pathlib import Path

_PIECE = 512 << 10
"""Bytes that are read at a time, few enough to be hashed while they are in the processor's cache."""
_LARGEST_GAP = 256 << 20
"""Bytes that a step may run ahead of what was asked for. A reader that jumps about pays for what it needs alone."""


class FileDigest:
    """The hash of a file's first bytes, which grows to that of the file."""

    def __init__(self, path: Path):
        """Hash nothing yet.

        Args:
            path: of a file that does not change meanwhile.
        """
        self.path = path
        self._sha = hashlib.sha256()
        self._done = 0

    def advance(self, begin: int, end: int, room: memoryview | None = None) -> None:
        """Bring the bytes from `begin` to `end` into the system's cache, hashed if what lies before them is near.

        Args:
            begin: first byte.
            end: the one behind the last.
            room: memory to read into; a little of its own if None.
        """
        if end > self._done and begin - self._done <= _LARGEST_GAP:
            self._hash(end, room)

    def finish(self) -> str:
        """The hash of the whole file, 64 hex digits."""
        self._hash(None)
        return self._sha.hexdigest()

    def _hash(self, end: int | None, room: memoryview | None = None) -> None:
        """Go on to byte `end`, or to the file's."""
        # Of its own, since the parts come from several threads in turn, and files can be thousands.
        piece = memoryview(bytearray(_PIECE)) if room is None else room
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._done)
            while end is None or self._done < end:
                wanted = len(piece) if end is None else min(len(piece), end - self._done)
                count = os.readv(file.fileno(), [piece[:wanted]])
                if not count:
                    break
                self._sha.update(piece[:count])
                self._done += count
