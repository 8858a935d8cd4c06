"""Traps of processes: who they are, who ends them, and who may use them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from canaries import ONE, SUM
from processes import run_python, user_seconds, wait_until_gone

from selfdev.sandbox import Limits, Sandbox, SandboxUnavailable
from selfdev.sandbox.child import Child
from selfdev.sandbox.job import READY, Call


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
                # A filter: the last layer stands. Time spent: the program runs, so the child has said so.
                if status["Seccomp"] == "2" and user_seconds(int(pid)) >= 0.2:
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
