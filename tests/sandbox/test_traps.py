"""Traps that jails of this kind have fallen into, one test each."""

import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from canaries import program

from selfdev.sandbox import Limits, Sandbox, SandboxUnavailable
from selfdev.sandbox.candidate import READY
from selfdev.sandbox.child import Child
from selfdev.sandbox.job import Call
from selfdev.sandbox.memory_file import MemoryFile

SUM = "def merge_models(model_dict, device):\n    return sum(model_dict.values())"
ONE = {"a": torch.ones(2)}


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a script that uses the sandbox in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    """Fail if a process is still there after a while."""
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        os.sched_yield()


def test_a_fork_after_threads_would_hang_so_the_forkserver_has_one(box: Sandbox) -> None:
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)  # this process has threads by now
    assert len(os.listdir(f"/proc/{box.pid}/task")) == 1
    with Sandbox() as started_with_threads:
        assert started_with_threads.merge(SUM, ONE).ok


def test_a_sealed_input_cannot_be_changed_by_anyone() -> None:
    file = MemoryFile("test")
    file.write(b"weights!", 0)
    file.seal_contents()
    with pytest.raises(PermissionError):
        os.pwrite(file.descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(file.descriptor, 8, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    for size in (0, 4, 100):
        with pytest.raises(PermissionError):
            os.ftruncate(file.descriptor, size)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    with mmap.mmap(file.descriptor, 8, flags=mmap.MAP_PRIVATE, prot=protection) as private:
        private[:1] = b"W"
    assert os.pread(file.descriptor, 8, 0) == b"weights!"
    file.close()


def test_an_input_that_somebody_maps_writable_cannot_be_sealed() -> None:
    file = MemoryFile("test")
    file.resize(8)
    with mmap.mmap(file.descriptor, 8), pytest.raises(OSError, match="busy"):
        file.seal_contents()
    file.close()


def test_a_result_file_cannot_shrink_under_its_reader() -> None:
    file = MemoryFile("test")
    file.resize(4096)
    file.seal_size()
    for size in (0, 4095, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(file.descriptor, size)
    file.write(b"but it can be written", 0)
    file.close()


def test_memory_files_never_land_on_the_standard_streams(tmp_path: Path) -> None:
    code = (
        "import os, torch\nfor fd in (0, 1, 2): os.close(fd)\n"
        "from selfdev.sandbox import Sandbox\n"
        "with Sandbox() as box:\n"
        f"    outcome = box.merge({SUM!r}, {{'a': torch.ones(2), 'b': torch.ones(2)}})\n"
        f"open({str(tmp_path / 'answer')!r}, 'w').write(str(outcome.tensor.tolist()))"
    )
    run_python(code)
    assert (tmp_path / "answer").read_text() == "[2.0, 2.0]"


def test_no_page_of_the_forkserver_is_writable_and_executable(box: Sandbox) -> None:
    lines = Path(f"/proc/{box.pid}/maps").read_text().splitlines()
    assert lines
    assert [line for line in lines if "w" in line.split()[1] and "x" in line.split()[1]] == []


def test_what_is_not_loaded_is_named_and_not_blamed_on_permissions(box: Sandbox) -> None:
    outcome = box.merge(program("import torch.onnx as got"), ONE)
    assert (outcome.status, outcome.failure) == ("error", "ModuleNotFoundError")
    assert "the jail can load no more" in outcome.error


def test_onednn_which_needs_executable_memory_is_off_in_the_jail_alone(box: Sandbox) -> None:
    before = torch.backends.mkldnn.enabled
    outcome = box.merge(program("got = not torch.backends.mkldnn.enabled"), {"a": torch.ones(2)})
    assert outcome.tensor is not None
    assert bool(outcome.tensor.all())
    assert torch.backends.mkldnn.enabled == before


def test_kernels_are_the_vectorised_ones(box: Sandbox) -> None:
    # Without /proc/cpuinfo at the right moment torch silently takes others, with other numbers.
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    outcome = box.merge(
        "def merge_models(model_dict, device):\n    return model_dict['a'].lgamma()", {"a": x}
    )
    assert outcome.tensor is not None
    assert torch.equal(outcome.tensor, x.lgamma())


def test_the_child_is_nobody_without_capabilities_and_filtered(box: Sandbox) -> None:
    # getuid is refused inside, so the proof is what the kernel says from outside.
    seen: list[dict[str, str]] = []

    def watch() -> None:
        children = Path(f"/proc/{box.pid}/task/{box.pid}/children")
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            for pid in children.read_text().split():
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                if status["Seccomp"] == "2":  # a filter: the last layer stands
                    seen.append(status)
                    os.kill(int(pid), signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = box.merge("def merge_models(model_dict, device):\n    while True: pass", ONE)
    watcher.join()
    user = "65534" if os.getuid() == 0 else str(os.getuid())
    assert seen[0]["Uid"].split() == [user] * 4
    assert all(int(seen[0][name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
    assert (seen[0]["NoNewPrivs"], seen[0]["Threads"]) == ("1", "1")
    assert (outcome.status, outcome.failure) == ("crashed", "Signal SIGKILL")  # not the deadline's doing


def test_children_and_descriptors_are_given_back(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    def held() -> tuple[int, int, str]:
        children = Path(f"/proc/{box.pid}/task/{box.pid}/children").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{box.pid}/fd")), children

    box.merge(SUM, model_dict)
    before = held()
    for source in (SUM, "x", "import os", program("os._exit(0)"), program("torch.zeros(10**12)")):
        for _ in range(3):
            box.merge_many(source, [model_dict] * 40, workers=3)
    assert held() == before
    assert before[2] == ""


def test_leaving_ends_the_forkserver() -> None:
    with Sandbox() as own:
        pid = own.pid
    wait_until_gone(pid)


def test_an_error_in_the_block_ends_the_forkserver_too() -> None:
    pids = []

    def fail() -> None:
        with Sandbox() as own:
            pids.append(own.pid)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    wait_until_gone(pids[0])


@pytest.mark.parametrize("started_by", ["main thread", "other thread"])
def test_a_killed_parent_leaves_nothing_behind(started_by: str) -> None:
    # The parent is killed while a child of the forkserver is in an endless loop.
    code = (
        "import os, signal, sys, threading, torch\n"
        "from pathlib import Path\n"
        "from selfdev.sandbox import Limits, Sandbox\n"
        "box = Sandbox(Limits(wall_seconds=100, cpu_seconds=100))\n"
        "def enter(): box.__enter__()\n"
        + (
            "enter()\n"
            if started_by == "main thread"
            else "t = threading.Thread(target=enter); t.start(); t.join()\n"
        )
        + "def watch():\n"
        "    children = Path(f'/proc/{box.pid}/task/{box.pid}/children')\n"
        "    while not children.read_text(): os.sched_yield()\n"
        "    print(box.pid, children.read_text(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=watch).start()\n"
        "box.merge('def merge_models(m, d):\\n    while True: pass', {'a': torch.ones(1)})\n"
    )
    done = run_python(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    server, child = map(int, done.stdout.split())
    wait_until_gone(server)
    wait_until_gone(child)


def test_the_end_of_the_thread_that_started_it_does_not_end_the_sandbox() -> None:
    own = Sandbox()
    thread = threading.Thread(target=own.__enter__)
    thread.start()
    thread.join()
    assert own.merge(SUM, ONE).ok
    own.close()


def test_a_forkserver_that_dies_is_started_anew() -> None:
    with Sandbox() as own:
        first = own.pid
        os.kill(first, signal.SIGKILL)
        assert own.merge(SUM, ONE).ok
        assert own.pid != first


def test_a_forked_process_may_not_use_its_parents_sandbox(box: Sandbox) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            box.merge(SUM, ONE)
        except SandboxUnavailable as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(pid, 0)
    assert "make a new one" in said
    assert box.merge(SUM, ONE).ok


@contextmanager
def interrupt(function: str, *, at_call: int = 1) -> Iterator[None]:
    """A Ctrl-C that arrives as this thread enters a function of the sandbox for the n-th time."""
    calls = 0

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_name == function and "sandbox" in frame.f_code.co_filename:
            calls += 1
            if calls == at_call:
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Turn a hang into a failure."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("function", "at_call"),
    [("_exactly", 2), ("submitted", 1), ("started", 1)],
    ids=["between an event's length and its body", "after the submission", "with the pidfd in hand"],
)
def test_an_interrupt_at_any_point_leaves_the_sandbox_usable(function: str, at_call: int) -> None:
    endless = "def merge_models(m, d):\n    while True: pass"
    with Sandbox(Limits(wall_seconds=100, cpu_seconds=100)) as own:
        first = own.pid
        with interrupt(function, at_call=at_call), pytest.raises(KeyboardInterrupt):
            own.merge(endless, ONE)
        wait_until_gone(first)  # and with it all of its children, which nobody would kill at their deadline
        with no_longer_than(60):
            assert own.merge(SUM, ONE).ok
        assert own.pid != first


def test_an_interrupted_program_ends() -> None:
    with Sandbox(Limits(wall_seconds=100, cpu_seconds=100)) as own:
        pids: list[int] = []

        def press() -> None:
            children = Path(f"/proc/{own.pid}/task/{own.pid}/children")
            while not pids:
                pids.extend(map(int, children.read_text().split()))
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(KeyboardInterrupt), no_longer_than(60):
            own.merge("def merge_models(m, d):\n    while True: pass", ONE)
        thread.join()
        wait_until_gone(pids[0])
        assert own.merge(SUM, ONE).ok


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_job_that_cannot_be_written_leaves_no_descriptor() -> None:
    before = open_descriptors()
    with pytest.raises(TypeError):
        Child("x", [Call({object(): torch.ones(1)})], Limits())  # type: ignore[dict-item]
    assert open_descriptors() == before


@pytest.mark.parametrize("spare", range(5))
def test_a_shortage_of_descriptors_leaves_none(spare: int) -> None:
    # Two files and the two ends of a pipe need four; so the first four attempts fail, each elsewhere.
    before = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if not Path(f"/proc/self/fd/{number}").is_symlink()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], limits[1]))
    try:
        child = Child("x", [Call(ONE)], Limits())
        child.close()
        succeeded = True
    except OSError:
        succeeded = False
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert succeeded == (spare == 4)
    assert open_descriptors() == before


def test_a_deadline_that_comes_before_the_pidfd_kills_once_it_is_here() -> None:
    victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    child = Child("x", [Call(ONE)], Limits())
    os.write(child.descriptors[2], READY)
    child.submitted()
    child.hear()
    child.expire()
    assert victim.poll() is None
    child.started(os.pidfd_open(victim.pid))
    assert victim.wait(20) == -signal.SIGKILL
    victim.communicate()
    (outcome,) = child.ended(signal.SIGKILL, 0.0)
    assert (outcome.status, outcome.failure) == ("timeout", "Timeout")
    child.close()


def test_a_forkserver_that_never_hands_over_the_pidfd_is_not_waited_for() -> None:
    child = Child("x", [Call(ONE)], Limits())
    os.write(child.descriptors[2], READY)
    child.submitted()
    child.hear()
    child.expire()
    assert child.deadline < float("inf")
    with pytest.raises(SandboxUnavailable, match="forkserver"):
        child.expire()
    child.close()
