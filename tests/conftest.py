"""Where the tests' own modules lie, and what every test stands on."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))


# Two processes share two cores, and what takes long there says nothing of the code.
settings.register_profile("selfdev", deadline=None)
settings.load_profile("selfdev")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C be Ctrl-C where the tests are a shell's background job, which ignores it and hands that down."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_terminal() -> None:
    """Let the output be as wide as in a file: what imports `readline` hands 80 columns down to its children."""
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
