"""Anonymous files in memory, by which tensors reach a jailed child and come back.

An input file is filled with write() and then sealed: it can never again be written, shrunk or grown, by
anyone, through any descriptor or mapping. (Sealing fails if somebody holds a writable shared mapping, so the
file is never mapped before.) A result file has its size before the child exists and is sealed against any
change of it, since a file that shrinks kills the process that reads it.
"""

import errno
import fcntl
import io
import os

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

from .tensor_file import TensorFile

_PATIENCE = 20.0
"""Seconds."""


class MemoryFile(TensorFile):
    """A file in memory with a descriptor that no exec inherits and that is never 0, 1 or 2."""

    def __init__(self, name: str):
        """Make an empty file; ``name`` shows in /proc only."""
        low = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # In a process that closed its standard streams the new descriptor would be one of 0 to 2, and the
            # child would put /dev/null over it.
            high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(low)
        super().__init__(io.FileIO(high, "r+"))

    def seal_contents(self, patience: float = _PATIENCE) -> None:
        """Forbid every change for good.

        Args:
            patience: seconds to wait for whoever holds one of its pages.

        Raises:
            OSError: somebody still does, or has mapped it to write.
        """
        self._seal(fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, patience)

    def seal_size(self) -> None:
        """Forbid every change of the size for good."""
        self._seal(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, _PATIENCE)

    def _seal(self, seals: int, patience: float) -> None:
        # The kernel too may hold a page for a while, to move it or to write it out, and waits only 0.2 s for itself.
        patiently = Retrying(
            retry=retry_if_exception(_is_busy),
            wait=wait_exponential(0.01, max=1.0),
            stop=stop_after_delay(patience),
            reraise=True,
        )
        patiently(fcntl.fcntl, self.descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EBUSY
