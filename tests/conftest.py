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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let nothing be found that another process or an earlier day has measured."""
    os.environ["SELFDEV_CACHE"] = str(tmp_path_factory.mktemp("selfdev") / "cache")
