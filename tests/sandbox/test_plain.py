"""The unsafe mode, and plain child processes, which it uses where a system has no forkserver."""

import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from canaries import ONE, SUM
from processes import run_python, wait_until_gone

from selfdev.sandbox import Limits, Sandbox, SandboxUnavailable
from selfdev.sandbox.job import CHUNK_CALLS

ENDLESS = "def merge_models(m, d):\n    while True: pass"


def entered(limits: Limits | None = None, *, plain: bool = True) -> Sandbox:
    sandbox = Sandbox(limits, unsafe=True, plain=plain)
    with pytest.warns(
        UserWarning, match="UNSAFE SANDBOX: model-written code runs with resource limits alone"
    ):
        return sandbox.__enter__()


@pytest.mark.parametrize("plain", [False, True], ids=["forkserver", "plain"])
def test_the_unsafe_mode_says_so_and_keeps_the_limits(plain: bool) -> None:
    unsafe = entered(plain=plain)
    try:
        greedy = unsafe.merge("import torch\ndef merge_models(m, d):\n    return torch.empty(10**9)", ONE)
        reads = unsafe.merge(
            "import torch\ndef merge_models(m, d):\n    return m['a'] * len(torch.os.listdir('/'))", ONE
        )
        unsafe.limits = Limits(wall_seconds=0.5)  # what ends has had more: the machine may be busy
        hang = unsafe.merge(ENDLESS, ONE)
    finally:
        unsafe.close()
    assert (hang.status, hang.failure, greedy.status) == ("timeout", "Timeout", "memory")
    assert reads.tensor is not None
    assert reads.tensor[0] == len(os.listdir("/"))  # which is why it is called unsafe


def test_a_plain_child_is_no_jail_and_must_be_asked_for_as_such() -> None:
    with pytest.raises(ValueError, match="unsafe"):
        Sandbox(plain=True)


def test_processor_time_counts_from_the_program_on() -> None:
    # Starting takes more than the one second that the program may use.
    limited = entered(Limits(wall_seconds=100, cpu_seconds=1))
    try:
        outcome = limited.merge(ENDLESS, ONE)  # the known program has passed
    finally:
        limited.close()
    assert (outcome.status, outcome.failure) == ("timeout", "CpuTime")


def test_calls_share_children_as_in_the_jail_and_get_the_same_numbers(
    box: Sandbox, plain_box: Sandbox
) -> None:
    # A program that remembers what it has seen in its process shows which calls shared a child.
    source = (
        "import torch\ntorch.seen = getattr(torch, 'seen', 0) + 1\n"
        "def merge_models(model_dict, device):\n    return torch.rand_like(model_dict['a']) + torch.seen"
    )
    calls = [{"a": torch.zeros(4)}] * (CHUNK_CALLS + 5)
    seeds = list(range(len(calls)))
    jailed = box.merge_many(source, calls, seeds=seeds)
    plain = plain_box.merge_many(source, calls, seeds=seeds)
    for one, other in zip(jailed, plain, strict=True):
        assert one.tensor is not None
        assert other.tensor is not None
        assert torch.equal(one.tensor, other.tensor)


ENDS = {
    "exits": ("torch.os._exit(3)", "EarlyExit"),
    "aborts": ("torch.os.abort()", "Signal SIGABRT"),
    "cuts_the_result_file": ("torch.os.truncate('result', 0); torch.os._exit(0)", "EarlyExit"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_child_that_ends_itself_has_crashed(name: str, plain_box: Sandbox) -> None:
    body, failure = ENDS[name]
    outcome = plain_box.merge(f"import torch\ndef merge_models(m, d):\n    {body}", ONE)
    assert (outcome.status, outcome.failure) == ("crashed", failure)


def test_an_interrupt_ends_the_children_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = entered(Limits(wall_seconds=1000, cpu_seconds=1000))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = (
        "import torch\ndef merge_models(m, d):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').close()\n    while True: pass"
    )
    # RLIMIT_FSIZE lets a program make a file, though it lets it write nothing.
    begun = tmp_path / "pid"

    def press() -> None:
        while not begun.exists():
            os.sched_yield()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        own.merge_many(source, [ONE, ONE])
    thread.join()
    own.close()
    begun.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_child_whose_parent_was_killed_ends_soon_after_its_deadline(tmp_path: Path) -> None:
    code = (
        "import os, signal, tempfile, threading, torch\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"  # a killed parent leaves its two files
        "from pathlib import Path\n"
        "from selfdev.sandbox import Limits, Sandbox\n"
        # Time enough to see the child before its deadline, and so much processor time that this does not end it.
        "limits = Limits(wall_seconds=4, cpu_seconds=1000)\n"
        "box = Sandbox(limits, unsafe=True, plain=True).__enter__()\n"
        f"begun = Path({str(tmp_path / 'begun')!r})\n"
        "def watch():\n"
        "    while not begun.exists(): os.sched_yield()\n"
        "    for task in Path('/proc/self/task').iterdir():\n"
        "        try: print((task / 'children').read_text(), flush=True)\n"
        "        except OSError: pass\n"  # a thread that has ended meanwhile
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=watch).start()\n"
        "source = f'def merge_models(m, d):\\n    open({str(begun)!r}, \"w\").close()\\n    while True: pass'\n"
        "box.merge(source, {'a': torch.ones(1)})\n"
    )
    done = run_python(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (child,) = set(done.stdout.split())
    wait_until_gone(int(child))


def test_a_child_that_does_not_start_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    own = entered()
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(SandboxUnavailable, match="did not start: ModuleNotFoundError"):
        own.merge(SUM, ONE)
    own.close()


# Another system, as far as Python shows it: functions that are not there, modules that cannot be imported.
ANOTHER_SYSTEM = """
import os, signal, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {modules!r}:
            raise ModuleNotFoundError(f"no module {{name}} here", name=name)

sys.meta_path.insert(0, Absent())
for name in {modules!r}:
    sys.modules.pop(name, None)
for name in {functions!r}:
    delattr(os, name)
"""

ATTEMPT = """
import torch
from selfdev.sandbox import Sandbox, SandboxUnavailable
for unsafe in (False, True):
    try:
        with Sandbox(unsafe=unsafe) as box:
            outcome = box.merge("def merge_models(m, d):\\n    return m['a'] * 2", {"a": torch.ones(2)})
            print(outcome.tensor.tolist())
    except SandboxUnavailable as reason:
        print("refused:", reason)
"""

CALLS = ["memfd_create", "pidfd_open"]


def test_without_the_calls_the_jail_is_refused_and_the_unsafe_mode_merges_and_says_so() -> None:
    done = run_python(ANOTHER_SYSTEM.format(modules=[], functions=CALLS) + ATTEMPT)
    assert done.returncode == 0, done.stderr
    refused, merged = done.stdout.splitlines()
    assert refused.startswith("refused: the jail needs Linux")
    assert "os.memfd_create, os.pidfd_open" in refused
    assert "use a Linux machine" in refused
    assert merged == "[2.0, 2.0]"
    assert "UNSAFE SANDBOX: model-written code runs with resource limits alone" in done.stderr


def test_where_posix_is_missing_everything_imports_and_the_unsafe_mode_merges() -> None:
    absent = ["resource", "fcntl"]
    # Libraries go by the system's name; they are imported while this one is still itself.
    code = "import peft, torch\nfrom transformers import AutoModelForCausalLM, PreTrainedModel\n"
    code += ANOTHER_SYSTEM.format(modules=absent, functions=[*CALLS, "fork", "forkpty", "setsid", "wait4"])
    code += "import selfdev.runs, selfdev.cli, selfdev.doctor\n" + ATTEMPT
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    refused, merged = done.stdout.splitlines()
    assert "fork" in refused
    assert "fcntl, resource" in refused
    assert merged == "[2.0, 2.0]"
    assert "runs with a deadline, without resource limits, alone" in done.stderr
