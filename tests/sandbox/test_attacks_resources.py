"""Attacks on the machine's time and memory, and floods. What is used up is the child's own budget."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from canaries import GOOD, program, repelled, succeeds_outside

from selfdev.sandbox import Limits, Sandbox

HANGS = {
    "empty_loop": "while True: pass",
    "loop_in_torch": "x = torch.ones(500, 500)\nwhile True: x @ x",
    "one_long_call_in_c": "sum(range(10**12))",
    "sleep": "sys.modules['time'].sleep(10**6)",
    "wait_for_a_lock": "lock = sys.modules['_thread'].allocate_lock(); lock.acquire(); lock.acquire()",
    "wait_for_itself_by_futex": "ctypes = sys.modules['ctypes']; word = ctypes.c_uint32(0)\n"
    "while True: ctypes.CDLL(None).syscall(202, ctypes.byref(word), 0, 0, None, None, 0)",
    "catastrophic_pattern": "sys.modules['re'].match(r'(a+)+$', 'a' * 40 + 'b')",
    "tower_of_powers": "x = 9 ** (9 ** 9)",
    "collector_bomb": "x = []\nwhile True: y = [x]; x.append(y); sys.modules['gc'].collect(); x.clear()",
    "flood_of_output": "while True: print('x' * 10000)",
    "flood_of_errors": "while True: sys.stderr.write('x' * 10000)",
    "flood_of_warnings": "import itertools\nfor i in itertools.count(): sys.modules['warnings'].warn(str(i))",
    "catches_everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "ignores_signals": "signal = sys.modules['_signal']\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except Exception: pass\nwhile True: pass",
    "hangs_in_its_message": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "hangs_on_exit": "def forever(*_):\n    while True: pass\nos._exit = forever\n"
    "sys.modules['__jail__.candidate'].os._exit = forever\nraise_ = iter(forever, 1)\nnext(raise_)",
}

GREEDY = {
    "huge_tensor": "torch.zeros(10**12)",
    "huge_bytes": "bytearray(10**12)",
    "growing_list": "x = [0]\nwhile True: x += x",
    "growing_string": "x = 'x'\nwhile True: x += x",
    "many_tensors": "x = []\nwhile True: x.append(torch.ones(10**6))",
    "anonymous_mappings": "x = []\nwhile True: x.append(sys.modules['mmap'].mmap(-1, 2**24, flags=0x22))",
    "huge_range_as_list": "list(range(10**11))",
    "huge_message": "raise RuntimeError('x' * 10**11)",
}


@pytest.mark.parametrize("name", HANGS)
def test_is_killed_at_the_deadline(
    name: str, strict_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    outcome = strict_box.merge(program(HANGS[name]), model_dict)
    assert (outcome.status, outcome.failure) == ("timeout", "Timeout"), outcome


@pytest.mark.parametrize("name", GREEDY)
def test_gets_no_more_than_its_memory(
    name: str, narrow_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    outcome = narrow_box.merge(program(GREEDY[name]), model_dict)
    assert (outcome.status, outcome.failure) in (("memory", "OutOfMemory"), ("error", "OSError")), outcome


def test_memory_is_counted_above_what_the_child_occupies_anyway(
    narrow_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    # An absolute limit of 64 MiB would fail everything: the warm interpreter alone has several hundred.
    assert narrow_box.merge(program("got = torch.ones(8 * 2**20).sum()"), model_dict).ok
    assert narrow_box.merge(program("got = torch.ones(32 * 2**20).sum()"), model_dict).status == "memory"


def libraries(pid: int) -> list[tuple[int, int]]:
    """Start and length of the mapped code of a process, the largest first. A fork has it in the same places."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, access, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if access == "r-xp" and inode != "0":
            found.append((start, end - start))
    return sorted(found, key=lambda place: -place[1])


@pytest.mark.parametrize("piece", ["mebibyte by mebibyte", "all at once"])
def test_libraries_cannot_be_made_writable(
    piece: str, narrow_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    # The kernel would copy each page that is written to, and no address space is added; RLIMIT_DATA does not
    # count what is larger than the address space that is left. What is asked for is torch's own code, which
    # cannot run afterwards, so the program leaves by forging the record of its failure.
    start, length = libraries(narrow_box.pid)[0]
    assert length > 128 * 2**20, "torch is too small for this test"
    size = length if piece == "all at once" else 2**20
    body = f"""
    libc = sys.modules['ctypes'].CDLL(None)
    address = sys.modules['ctypes'].c_void_p
    frame = sys._getframe()
    while 'results' not in frame.f_locals: frame = frame.f_back
    results, Record = frame.f_locals['results'], sys.modules['__jail__.job'].Record
    pack, leave, mine = Record.pack, os._exit, 0
    for place in range({start}, {start + length - size + 1}, {size}):
        mine += libc.mprotect(address(place), {size}, 3) == 0
    results[:Record.SIZE] = pack(Record(2, 'error', 'ValueError', str(mine), 0.0))
    leave(0)
    """
    outcome = narrow_box.merge(program(body), model_dict)
    assert outcome.failure == "ValueError", outcome
    assert outcome.error == "0"


@pytest.mark.parametrize("flags", ["0x21", "0x122"], ids=["shared", "growing down"])
def test_memory_that_no_limit_counts_is_refused(
    flags: str, narrow_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    # With it a program could give libraries back and take as much address space that RLIMIT_DATA does not see.
    source = program(f"got = sys.modules['mmap'].mmap(-1, 4096, flags={flags}) is not None")
    assert succeeds_outside(source)
    assert repelled(narrow_box.merge(source, model_dict))


def test_inputs_do_not_count_against_the_budget(narrow_box: Sandbox) -> None:
    large = {name: torch.ones(6 * 2**20) for name in "abc"}  # 72 MiB of 64
    outcome = narrow_box.merge("def merge_models(model_dict, device):\n    return model_dict['a'] * 2", large)
    assert outcome.ok, outcome


DEEP = {
    "impossible_tensor": ("torch.zeros(2**62)", {"error"}),
    "python_recursion": ("def f(): return f()\nf()", {"error"}),
    "unlimited_recursion": (
        "sys.setrecursionlimit(10**9)\ndef f(x): return f([x])\nf(1)",
        {"crashed", "memory", "timeout", "error"},
    ),
    "recursion_in_c": (
        "sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        {"crashed", "memory", "timeout", "error"},
    ),
    "recursive_repr": (
        "class A:\n    def __repr__(self): return repr(self)\nraise ValueError(A())",
        {"error"},
    ),
    "null_pointer": ("sys.modules['ctypes'].string_at(0)", {"crashed"}),
    "out_of_bounds": ("torch.as_strided(torch.ones(1), (1,), (1,), 2**40).sum()", {"error", "crashed"}),
    "abort": ("sys.modules['ctypes'].CDLL(None).abort()", {"crashed"}),
    "many_threads": ("while True: sys.modules['_thread'].start_new_thread(print, ())", {"error"}),
    "many_descriptors": ("while True: os.dup(0)", {"error"}),
    "many_processes": ("while True: os.fork()", {"error"}),
    "locked_memory": (
        "ctypes = sys.modules['ctypes']\nassert ctypes.CDLL(None).mlockall(3) == 0",
        {"error"},
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_harms_itself_alone(name: str, narrow_box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body, statuses = DEEP[name]
    assert narrow_box.merge(program(body), model_dict).status in statuses
    assert narrow_box.merge(GOOD, model_dict).ok


SOURCES = {
    "six_megabytes": ("x = [" + "1," * 3_000_000 + "]\n" + GOOD, "SourceTooLong"),
    "deep_brackets": ("x = " + "(" * 5000 + ")" * 5000 + "\n" + GOOD, "SyntaxError"),
    "deep_minus": ("x = " + "-" * 60000 + "1\n" + GOOD, "TooComplex"),
    "deep_attributes": ("x = a" + ".a" * 30000 + "\n" + GOOD, "TooComplex"),
    "deep_calls": ("x = a" + "()" * 30000 + "\n" + GOOD, "TooComplex"),
    "deep_indents": (
        "".join(" " * i + "if 1:\n" for i in range(150)) + " " * 150 + "1\n" + GOOD,
        "SyntaxError",
    ),
    "long_sum": ("x = 1" + "+1" * 30000 + "\n" + GOOD, "TooComplex"),
    "null_byte": ("x = '\0'\n" + GOOD, "SyntaxError"),
    "lone_surrogate": ("x = '\ud800'\n" + GOOD, "SyntaxError"),
    "huge_number": ("x = " + "9" * 60000 + "\n" + GOOD, "SyntaxError"),
    "not_python": ("```python\n" + GOOD + "\n```", "SyntaxError"),
    "empty": ("", "NoEntryPoint"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_that_hurts_the_parser_is_rejected(
    name: str, narrow_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    source, failure = SOURCES[name]
    outcome = narrow_box.merge(source, model_dict)
    if (outcome.status, outcome.failure) == ("crashed", "Signal SIGSEGV"):
        pytest.skip("this Python's parser crashes, which is why it parses in a child")
    assert (outcome.status, outcome.failure) == ("rejected", failure), outcome


@pytest.fixture(scope="module")
def short_box() -> Iterator[Sandbox]:
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=60)) as running:
        yield running


@pytest.mark.parametrize("name", ["empty_loop", "ignores_signals"])
def test_is_killed_when_its_processor_time_is_used(
    name: str, short_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    outcome = short_box.merge(program(HANGS[name]), model_dict)
    assert (outcome.status, outcome.failure) == ("timeout", "CpuTime"), outcome


def test_what_a_timeout_took_is_charged_to_the_call_that_ran_and_all_after(patient_box: Sandbox) -> None:
    source = "def merge_models(model_dict, device):\n    while model_dict['a'][0] == 2: pass\n    return model_dict['a']"
    calls = [{"a": torch.tensor([float(i)])} for i in range(4)]
    statuses = [outcome.status for outcome in patient_box.merge_many(source, calls)]
    assert statuses == ["ok", "ok", "timeout", "timeout"]


def test_an_exception_is_charged_to_its_own_call_alone(box: Sandbox) -> None:
    source = "def merge_models(model_dict, device):\n    1 / int(model_dict['a'][0] - 2)\n    return model_dict['a']"
    outcomes = box.merge_many(source, [{"a": torch.tensor([float(i)])} for i in range(4)])
    assert [outcome.failure for outcome in outcomes] == ["", "", "ZeroDivisionError", ""]


def test_floods_reach_neither_standard_stream(
    box: Sandbox, model_dict: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    body = "print('canary'); sys.stderr.write('canary'); [os.write(fd, b'canary') for fd in (1, 2)]"
    assert box.merge(program(body), model_dict).ok
    assert capfd.readouterr() == ("", "")


def test_nothing_but_the_null_device_is_open(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    # Reading from /dev/null ends at once; reading from a descriptor that is not there fails.
    body = """
    open_ones = []
    for fd in range(4096):
        try:
            assert os.read(fd, 1) == b""
            open_ones.append(fd)
        except OSError as error:
            assert error.errno == 9 or fd in (1, 2)
    got = open_ones in ([0], [0, 1, 2])
    """
    outcome = box.merge(program(body), model_dict)
    assert outcome.ok, outcome
    assert outcome.tensor is not None
    assert bool(outcome.tensor.all())
