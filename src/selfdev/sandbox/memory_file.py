"""Anonymous files in memory, by which tensors reach a jailed child and come back.

An input file is filled with write() and then sealed: it can never again be written, shrunk or grown, by
anyone, through any descriptor or mapping. (Sealing fails if somebody holds a writable shared mapping, so the
file is never mapped before.) A result file has its size before the child exists and is sealed against any
change of it, since a file that shrinks kills the process that reads it.
"""

import ctypes
import fcntl
import os

import torch

# A write() of 2 GiB or more is cut short by the kernel; this stays below.
_LARGEST_WRITE = 1 << 30


class MemoryFile:
    """A file in memory with a descriptor that no exec inherits and that is never 0, 1 or 2."""

    def __init__(self, name: str):
        """Make an empty file; ``name`` shows in /proc only."""
        low = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # In a process that closed its standard streams the new descriptor would be one of 0 to 2, and the
            # child would put /dev/null over it.
            self.descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(low)

    def close(self) -> None:
        """Give the descriptor back. The memory is free once nobody maps the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def write(self, data: "bytes | ctypes.Array[ctypes.c_char]", offset: int) -> None:
        """Write all of ``data`` from byte ``offset`` on."""
        with memoryview(data) as view, view.cast("B") as todo:
            done = 0
            while done < len(todo):
                done += os.pwrite(self.descriptor, todo[done : done + _LARGEST_WRITE], offset + done)

    def write_tensor(self, tensor: torch.Tensor, offset: int) -> None:
        """Write a contiguous CPU tensor's bytes from byte ``offset`` on, straight out of its memory."""
        if tensor.numel():
            size = tensor.numel() * tensor.element_size()
            self.write((ctypes.c_char * size).from_address(tensor.data_ptr()), offset)

    def read_into(self, target: torch.Tensor, offset: int) -> None:
        """Fill a contiguous CPU tensor with the bytes from byte ``offset`` on.

        Raises:
            EOFError: where the file ends before.
        """
        size = target.numel() * target.element_size()
        if not size:
            return
        view = memoryview((ctypes.c_char * size).from_address(target.data_ptr())).cast("B")
        done = 0
        while done < size:
            count = os.preadv(self.descriptor, [view[done : done + _LARGEST_WRITE]], offset + done)
            if not count:
                raise EOFError(f"memory file ends {size - done} bytes early")
            done += count

    def resize(self, size: int) -> None:
        """Set the size in bytes; new bytes are zero."""
        os.ftruncate(self.descriptor, size)

    def seal_contents(self) -> None:
        """Forbid every change for good."""
        self._seal(fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def seal_size(self) -> None:
        """Forbid every change of the size for good."""
        self._seal(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def _seal(self, seals: int) -> None:
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
