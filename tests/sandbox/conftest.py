"""One warm sandbox for all tests, one without a jail, and the canaries."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from canaries import Listeners, Room

from selfdev.sandbox import Limits, Sandbox, SandboxUnavailable


@pytest.fixture(scope="session")
def box() -> Iterator[Sandbox]:
    try:
        with Sandbox(Limits(wall_seconds=20, cpu_seconds=20, memory_bytes=1024**3)) as running:
            yield running
    except SandboxUnavailable as reason:
        pytest.fail(f"the jail cannot be built on this machine: {reason}")


@pytest.fixture(scope="session")
def strict_box() -> Iterator[Sandbox]:
    """Small budgets, for what never ends: all that it may do in its half a second is to run."""
    with Sandbox(Limits(wall_seconds=0.5, cpu_seconds=20, memory_bytes=64 * 1024**2)) as running:
        yield running


@pytest.fixture(scope="session")
def narrow_box() -> Iterator[Sandbox]:
    """Little memory, and time enough on a busy machine."""
    with Sandbox(Limits(wall_seconds=20, cpu_seconds=20, memory_bytes=64 * 1024**2)) as running:
        yield running


@pytest.fixture
def patient_box(narrow_box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """For what does something first and never ends then."""
    monkeypatch.setattr(narrow_box, "limits", replace(narrow_box.limits, wall_seconds=4))
    return narrow_box


@pytest.fixture(scope="session")
def plain_box() -> Iterator[Sandbox]:
    """What the unsafe mode is where there is no forkserver."""
    sandbox = Sandbox(
        Limits(wall_seconds=20, cpu_seconds=20, memory_bytes=1024**3), unsafe=True, plain=True, workers=2
    )
    with pytest.warns(UserWarning, match="UNSAFE"):
        sandbox.__enter__()
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="session", params=["box", "plain_box"])
def any_box(request: pytest.FixtureRequest) -> Sandbox:
    """Each in turn: what holds of one holds of the other."""
    running: Sandbox = request.getfixturevalue(request.param)
    return running


@pytest.fixture
def model_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(12, 8, generator=generator) for name in "abcd"}


@pytest.fixture
def room() -> Iterator[Room]:
    # Not pytest's tmp_path, whose parents are closed to other users: the jail may run as another one, and the
    # lock must be the jail's and not a mode bit's.
    with tempfile.TemporaryDirectory(prefix="room") as path:
        yield Room(Path(path))


@pytest.fixture
def listeners(room: Room) -> Iterator[Listeners]:
    opened = Listeners(room.path)
    room.remember()
    yield opened
    opened.close()
