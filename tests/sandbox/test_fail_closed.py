"""Where a layer cannot be installed, nothing runs. A filter around the test makes the kernel refuse."""

import errno
import os
import platform
import subprocess
import sys

import pytest

from selfdev.sandbox import Sandbox, SandboxUnavailable

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers below are x86_64's")

# Refuses one system call (if it comes with this first argument) to itself and all that it starts, then tries.
REFUSING = """
import ctypes, struct, sys, torch, warnings
from selfdev.sandbox import kernel
from selfdev.sandbox.seccomp import instruction
from selfdev.sandbox import Sandbox, SandboxUnavailable
number, argument, error = map(int, sys.argv[1:4])
load_number, load_argument = instruction(0x20, 0), instruction(0x20, 16)
lines = [load_number, instruction(0x15, number, if_false=4)]
check = [load_argument, instruction(0x15, max(argument, 0), if_false=1)]
lines += check if argument >= 0 else [load_number, load_number]
lines += [instruction(0x06, 0x00050000 | error), instruction(0x06, 0x7FFF0000), instruction(0x06, 0x7FFF0000)]
code = b"".join(lines)
buffer = ctypes.create_string_buffer(code, len(code))
kernel.prctl(38, 1)
kernel.prctl(22, 2, struct.pack("@HP", len(lines), ctypes.addressof(buffer)))
source = "def merge_models(model_dict, device):\\n    return model_dict['a']"
warnings.simplefilter("ignore")
for mode in sys.argv[4:]:
    try:
        with Sandbox(unsafe=mode == "unsafe") as box:
            print(mode, "runs", box.merge(source, {"a": torch.ones(1)}).status)
    except SandboxUnavailable as reason:
        print(mode, "refuses:", reason)
"""

# layer: number of a call that it needs, its first argument (-1: any), what the kernel says
NEEDS = {
    "Landlock": (444, -1, errno.ENOSYS),
    "seccomp": (157, 22, errno.EINVAL),
    "user": (126, -1, errno.EPERM),
}


def attempt(number: int, argument: int, error: int, *modes: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, str(number), str(argument), str(error), *modes],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("layer", NEEDS)
def test_a_missing_layer_refuses_with_its_name_and_a_way_out(layer: str) -> None:
    (said,) = attempt(*NEEDS[layer], "safe")
    assert said.startswith(f"safe refuses: layer '{layer}': ")
    assert "; " in said


def test_the_unsafe_mode_runs_without_a_layer_that_the_safe_one_needs() -> None:
    assert attempt(*NEEDS["Landlock"], "unsafe") == ["unsafe runs ok"]


def test_the_unsafe_mode_needs_its_resource_limits() -> None:
    (said,) = attempt(302, 0, errno.EPERM, "unsafe")
    assert said.startswith("unsafe refuses: ")
    assert "not permitted" in said


def test_a_machine_without_process_descriptors_is_refused() -> None:
    said, without = attempt(434, -1, errno.ENOSYS, "safe", "unsafe")
    assert "process descriptors" in said
    assert "needs Linux 5.3" in said
    assert without == "unsafe runs ok"  # in plain child processes


@pytest.mark.parametrize(("system", "way_out"), [("darwin", "Linux"), ("win32", "WSL 2")])
def test_other_systems_are_refused(system: str, way_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(SandboxUnavailable, match=f"on {system} is without os.memfd_create.*{way_out}"):
        Sandbox().__enter__()
