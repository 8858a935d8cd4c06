"""A file through which tensors pass between two processes as raw bytes: one writes, the other maps it."""

import ctypes
import io

import torch


class TensorFile:
    """Bytes and tensors at given places of an open file. Never asks where the file's other users stand."""

    def __init__(self, file: io.FileIO):
        """Take over ``file``, which is open for reading and writing."""
        self._file = file

    @property
    def descriptor(self) -> int:
        """The file's descriptor. Raises ValueError once the file is closed."""
        return self._file.fileno()

    def close(self) -> None:
        """Give the descriptor back. A second call does nothing."""
        self._file.close()

    def resize(self, size: int) -> None:
        """Set the size in bytes; new bytes are zero."""
        self._file.truncate(size)

    def write(self, data: "bytes | ctypes.Array[ctypes.c_char]", offset: int) -> None:
        """Write all of ``data`` from byte ``offset`` on."""
        self._file.seek(offset)
        with memoryview(data) as view, view.cast("B") as todo:
            done = 0
            while done < len(todo):  # one call writes 2 GiB at most
                done += self._file.write(todo[done:])

    def write_tensor(self, tensor: torch.Tensor, offset: int) -> None:
        """Write a contiguous CPU tensor's bytes from byte ``offset`` on, straight out of its memory."""
        if tensor.numel():
            self.write(_memory(tensor), offset)

    def read(self, size: int, offset: int) -> bytes:
        """The ``size`` bytes from byte ``offset`` on.

        Raises:
            EOFError: where the file ends before.
        """
        data = bytearray(size)
        self._read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, target: torch.Tensor, offset: int) -> None:
        """Fill a contiguous CPU tensor with the bytes from byte ``offset`` on.

        Raises:
            EOFError: where the file ends before.
        """
        if target.numel():
            self._read_into(memoryview(_memory(target)).cast("B"), offset)

    def _read_into(self, target: memoryview, offset: int) -> None:
        self._file.seek(offset)
        done = 0
        while done < len(target):
            count = self._file.readinto(target[done:])
            if not count:
                raise EOFError(f"the file ends {len(target) - done} bytes early")
            done += count


def _memory(tensor: torch.Tensor) -> "ctypes.Array[ctypes.c_char]":
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr())
