"""What has been written, brought to the disk."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Have the disk hold a folder's entries or a file's bytes.

    Raises:
        OSError: it cannot.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
