"""Attacks by and on processes: none is made, none is replaced, none is signalled, looked into or changed."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from canaries import Room, program, repelled, succeeded, succeeds_outside

from selfdev.sandbox import Sandbox

CTYPES = "ctypes = sys.modules['ctypes']; libc = ctypes.CDLL(None, use_errno=True)\n"
FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
VECTOR = "import struct\nvector = struct.pack('QQ', $ADDRESS, $LENGTH)\n".replace(
    "import struct", "struct = sys.modules['struct']"
)

STARTS = {
    "fork": "pid = os.fork()\nif pid == 0:\n    open('$ROOM/new', 'w'); os._exit(0)\nos.waitpid(pid, 0); got = True",
    "forkpty": "pid, fd = os.forkpty()\nif pid == 0:\n    open('$ROOM/new', 'w'); os._exit(0)\nos.waitpid(pid, 0); got = True",
    "fork_by_libc": CTYPES
    + "pid = libc.fork()\nif pid == 0:\n    open('$ROOM/new', 'w'); os._exit(0)\nif pid > 0:\n    os.waitpid(pid, 0); got = True",
    "system": "got = os.system('echo > $ROOM/new') == 0",
    "system_by_libc": CTYPES + "got = libc.system(b'echo > $ROOM/new') == 0",
    "posix_spawn": "pid = os.posix_spawn('/bin/sh', ['sh', '-c', 'echo > $ROOM/new'], {})\nos.waitpid(pid, 0); got = True",
    "execve": "os.execve('/bin/sh', ['sh', '-c', 'echo > $ROOM/new'], {})",
    "execveat_by_number": CTYPES
    + "argv = (ctypes.c_char_p * 4)(b'sh', b'-c', b'echo > $ROOM/new', None)\nlibc.syscall(322, -100, b'/bin/sh', argv, None, 0)",
    "subprocess": "got = sys.modules['subprocess'].run(['touch', '$ROOM/new']).returncode == 0",
    "popen": "got = os.popen('echo > $ROOM/new; echo x').read()",
    "thread": "t = sys.modules['threading'].Thread(target=lambda: open('$ROOM/new', 'w')); t.start(); t.join(); got = True",
    "raw_thread": "import itertools\nsys.modules['_thread'].start_new_thread(lambda: open('$ROOM/new', 'w').close(), ())\n"
    "got = next(i for i in itertools.count() if os.path.exists('$ROOM/new')) + 1",
}

REACHES = {
    "signal_zero": "got = os.kill($VICTIM, 0) is None",
    "signal_by_number": CTYPES + "got = libc.syscall(62, $VICTIM, 0) == 0",
    "signal_thread": CTYPES + "got = libc.syscall(234, $VICTIM, $VICTIM, 0) == 0",
    "terminate": "got = os.kill($VICTIM, 15) is None",
    "kill_group": "got = os.killpg($VICTIM, 15) is None",
    "process_descriptor": "got = os.pidfd_open($VICTIM) > 0",
    "priority": "got = os.setpriority(os.PRIO_PROCESS, $VICTIM, 19) is None",
    "affinity": "got = os.sched_setaffinity($VICTIM, {0}) is None",
    "session_of": "got = os.getsid($VICTIM) > 0",
    "limits_of": "got = sys.modules['resource'].prlimit($VICTIM, 7)",
    "trace": CTYPES + "got = libc.ptrace(0x4206, ctypes.c_long($VICTIM), None, None) == 0",
    "read_memory": CTYPES
    + VECTOR
    + "mine = ctypes.create_string_buffer($LENGTH)\nlocal = struct.pack('QQ', ctypes.addressof(mine), $LENGTH)\n"
    "got = libc.process_vm_readv($VICTIM, local, 1, vector, 1, 0) > 0",
    "write_memory": CTYPES
    + VECTOR
    + "mine = ctypes.create_string_buffer($LENGTH)\nlocal = struct.pack('QQ', ctypes.addressof(mine), $LENGTH)\n"
    "got = libc.process_vm_writev($VICTIM, local, 1, vector, 1, 0) > 0",
    "memory_file": "got = open('/proc/$VICTIM/mem', 'rb')",
    "environment": "got = open('/proc/$VICTIM/environ', 'rb').read()",
    "descriptors": "got = os.listdir('/proc/$VICTIM/fd')",
    "compare": CTYPES + "got = libc.syscall(312, $VICTIM, $VICTIM, 1, 0, 0) == 0",
    "affinity_of": "got = os.sched_getaffinity($VICTIM)",
    # A process's clock has a negative number: how much processor time has it used?
    "clock_of": CTYPES
    + "got = libc.clock_gettime(ctypes.c_int(~$VICTIM << 3 | 2), ctypes.create_string_buffer(16)) == 0",
    "clock_resolution_of": CTYPES
    + "got = libc.clock_getres(ctypes.c_int(~$VICTIM << 3 | 2), ctypes.create_string_buffer(16)) == 0",
    # A lock that says it is held by the victim: the kernel looks for it (ESRCH if there is none), lends it this
    # process's priority, and gives up at once, since the time is past.
    "lock_of": CTYPES
    + f"word = ctypes.c_uint32($VICTIM); libc.syscall({FUTEX}, ctypes.byref(word), 6, 0, bytes(16), None, 0)\n"
    "got = ctypes.get_errno() == 110",
    "try_lock_of": CTYPES
    + f"word = ctypes.c_uint32($VICTIM); libc.syscall({FUTEX}, ctypes.byref(word), 8, 0, None, None, 0)\n"
    "got = ctypes.get_errno() == 11",
}


class Victim:
    """A process of this user, with a known place in its memory, that any signal would end."""

    CODE = (
        "import ctypes, sys, time; b = ctypes.create_string_buffer(b'the-canary-sings');"
        "ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(2**64 - 1), 0, 0, 0);"
        "print(ctypes.addressof(b), flush=True); sys.stdin.read(); print(b.value.decode(), flush=True)"
    )

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.places = {
            "VICTIM": self.process.pid,
            "ADDRESS": int(self.process.stdout.readline()),
            "LENGTH": len("the-canary-sings"),
        }

    def unharmed(self) -> bool:
        """Whether it lives, with its memory as it was. Ends it."""
        said, _ = self.process.communicate()
        return self.process.returncode == 0 and said.strip() == "the-canary-sings"


@pytest.fixture
def victims() -> Iterator[list[Victim]]:
    both = [Victim(), Victim()]
    yield both
    for victim in both:
        if victim.process.poll() is None:
            victim.process.kill()
        victim.process.communicate()


@pytest.mark.parametrize("name", STARTS)
def test_no_process_starts(name: str, box: Sandbox, room: Room, model_dict: dict[str, torch.Tensor]) -> None:
    source = program(STARTS[name], ROOM=room.path)
    succeeds_outside(source)
    assert (room.path / "new").exists(), "the attack does not work even without a jail"
    (room.path / "new").unlink()
    room.remember()
    outcome = box.merge(source, model_dict)
    assert repelled(outcome), outcome
    assert room.untouched


@pytest.mark.parametrize("name", REACHES)
def test_no_process_is_reached(
    name: str, box: Sandbox, victims: list[Victim], model_dict: dict[str, torch.Tensor]
) -> None:
    outside, inside = victims
    assert succeeds_outside(program(REACHES[name], **outside.places)), "the attack does not work"
    outcome = box.merge(program(REACHES[name], **inside.places), model_dict)
    assert repelled(outcome), outcome
    assert inside.unharmed()


# What every process may do with itself outside.
SELF = {
    "change_user": CTYPES + "got = libc.setresuid(-1, -1, -1) == 0",
    "dumpable_again": CTYPES + "got = libc.prctl(4, 1, 0, 0, 0) == 0",
    "outlive_the_parent": CTYPES + "got = libc.prctl(1, 0, 0, 0, 0) == 0",
    "raise_a_limit": "r = sys.modules['resource']; got = r.setrlimit(9, (r.getrlimit(9)[1],) * 2) is None",
    "personality": CTYPES + "got = libc.personality(0x0040000) != -1",
    "shared_memory_segment": CTYPES + "got = libc.shmget(0, 4096, 0o1600) >= 0",
    "memory_file": "got = os.memfd_create('x') >= 0",
    "pipe": "got = os.pipe()",
    "duplicate_descriptor": "got = os.dup(0) >= 0",
    "descriptor_flags": "got = sys.modules['fcntl'].fcntl(0, 1) is not None",
    "alarm": CTYPES + "got = libc.setitimer(0, ctypes.create_string_buffer(32), None) == 0",
    # On a page that two sandboxes map, such as torch's, it would wake what waits in the other.
    "shared_lock": CTYPES
    + f"got = libc.syscall({FUTEX}, ctypes.byref(ctypes.c_uint32()), 1, 1, None, None, 0) == 0",
    "executable_mapping": "got = sys.modules['mmap'].mmap(-1, 4096, flags=0x22, prot=5) is not None",
    "writable_and_executable": "got = sys.modules['mmap'].mmap(-1, 4096, flags=0x22, prot=7) is not None",
    "make_executable": CTYPES
    + "m = sys.modules['mmap'].mmap(-1, 4096, flags=0x22)\na = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    "got = libc.mprotect(ctypes.c_void_p(a), 4096, 5) == 0",
    "make_executable_by_key": CTYPES
    + "m = sys.modules['mmap'].mmap(-1, 4096, flags=0x22)\na = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    "got = libc.syscall(329, ctypes.c_void_p(a), 4096, 5, -1) == 0",
}

# What the kernel answers in its own way: it does it, or finds the arguments wrong. In the jail it is not asked.
ASKED = {
    "become_root": "libc.setuid(0)",
    "unshare": "libc.unshare(0x10000000)",
    "another_filter": "libc.prctl(22, 2, None, 0, 0)",
    "namespace": "libc.setns(-1, 0)",
    "perf_event": "libc.syscall(298, None, 0, -1, -1, 0)",
    "bpf": "libc.syscall(321, 0, None, 1 << 20)",
    "userfault": "libc.syscall(323, 1)",
    "keyring": "libc.syscall(250, 0, -3, 1)",
    "device_control": "libc.ioctl(1, 0x5401, None)",
}

if platform.machine() != "x86_64":  # the calls by number have x86_64's
    SELF, ASKED = (
        {name: body for name, body in family.items() if "syscall(" not in body or str(FUTEX) in body}
        for family in (SELF, ASKED)
    )


@pytest.mark.parametrize("name", SELF)
def test_nothing_is_regained(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    source = program(SELF[name])
    assert succeeds_outside(source), "the attack does not work even without a jail"
    outcome = box.merge(source, model_dict)
    assert repelled(outcome), outcome


@pytest.mark.parametrize("name", ASKED)
def test_the_kernel_is_not_even_asked(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    source = program(CTYPES + f"got = {ASKED[name]} == -1 and ctypes.get_errno() == 1")
    if succeeds_outside(source):
        pytest.skip("this user is refused it without a jail, too; that proves nothing")
    outcome = box.merge(source, model_dict)
    assert succeeded(outcome), outcome  # refused with EPERM, which the filter gives


def test_a_call_of_the_x32_interface_kills(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    outcome = box.merge(program(CTYPES + "got = libc.syscall(0x40000000 + 39) > 0"), model_dict)
    assert (outcome.status, outcome.failure) == ("crashed", "Signal SIGSYS")


def test_parent_and_forkserver_survive_a_massacre(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    source = program(
        f"for pid in (1, os.getppid(), {os.getpid()}, -1, 0):\n    try: os.kill(pid, 9)\n    except Exception: pass"
    )
    box.merge(source, model_dict)
    assert box.merge("def merge_models(model_dict, device):\n    return model_dict['a']", model_dict).ok
