"""The heap of a process that merges: large tensors go back to the system as soon as nobody needs them.

glibc raises the size from which a block is mapped alone whenever such a block is freed, up to 32 MB. After the first
large tensor all others lie in its arenas, one for each thread, and what they leave stays with the process: 350 MB of
SmolLM2-135M's 1,200 in one merge of two.
"""

import ctypes
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE = 4 << 20
"""Bytes of a block that is mapped alone, and stays so: to map smaller ones takes longer than it is worth."""
_LEFT = 2 * _LARGE
"""Free bytes at an arena's end that stay. With glibc's 128 KB each part of a merge would be mapped anew."""


def return_large_blocks() -> None:
    """Have them mapped alone from now on; where the C library is not glibc nothing changes."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            libc.mallopt(_M_TRIM_THRESHOLD, _LEFT)
