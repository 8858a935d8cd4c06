"""Hashing of the input files that begins before torch is there, whose import takes as long as a small merge."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from selfdev.models.digest import FileDigest

_PIECE = 16 << 20

_ROOM = 4 << 20
"""Bytes that are read at a time. After each it waits for the interpreter's lock, which an import keeps for 5 ms."""

_MOST = 2 << 30
"""Bytes that are hashed at the most. They lie in the system's cache until the merge comes to them."""


class HeadStart:
    """A thread that hashes the beginnings of files, all in step, since a merge reads all in step."""

    def __init__(self, sources: Iterable[str]):
        """Begin.

        Args:
            sources: of models, as the user gave them. Those that are no folders of safetensors are left alone.
        """
        folders = [Path(os.path.expanduser(source)) for source in sources if source]
        # One shard each: a merge that has more takes so long that nothing is gained.
        firsts = [
            next(filter(Path.is_file, sorted(folder.glob("*.safetensors"))), None) for folder in folders
        ]
        self._digests = {path: FileDigest(path) for path in firsts if path is not None}
        self._stopped = Event()
        self._thread = Thread(target=self._hash, name="head-start", daemon=True)
        self._thread.start()

    def stop(self) -> Mapping[Path, FileDigest]:
        """What was hashed so far, to go on from."""
        self._stopped.set()
        self._thread.join()
        return self._digests

    def _hash(self) -> None:
        end, room = 0, memoryview(bytearray(_ROOM))
        with suppress(OSError):  # the merge comes upon it too, and says it
            while self._digests and end < _MOST // len(self._digests):
                begin, end = end, end + _PIECE
                for digest in self._digests.values():
                    if self._stopped.is_set():
                        return
                    digest.advance(begin, end, room)
