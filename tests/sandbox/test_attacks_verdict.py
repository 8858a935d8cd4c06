"""Attacks on the verdict: leaving early, forging the record, patching torch, and outputs that lie."""

import _ctypes
import math
import os
import shutil

import pytest
import torch
from canaries import SECRET, Room, program, succeeded, succeeds_outside

from selfdev.sandbox import Sandbox, Status

GOOD = "def merge_models(model_dict, device):\n    return model_dict['a']"

# What the jail itself holds, found as an attacker would: in the frames below and among the loaded modules.
JAIL = (
    "jail = {name: module for name, module in sys.modules.items() if name.startswith('__jail__.')}\n"
    "frame = sys._getframe()\nwhile 'results' not in frame.f_locals: frame = frame.f_back\n"
    "results = frame.f_locals['results']\nRecord, State = jail['__jail__.job'].Record, jail['__jail__.job'].State\n"
)

LEAVES = {
    "exit_zero": ("os._exit(0)", "EarlyExit"),
    "exit_other": ("os._exit(3)", "EarlyExit"),
    "exit_by_number": ("sys.modules['ctypes'].CDLL(None).syscall(231, 0)", "EarlyExit"),
    "exit_by_libc": ("sys.modules['ctypes'].CDLL(None)._exit(0)", "EarlyExit"),
    "exit_at_code_of_a_missing_layer": ("os._exit(70)", "EarlyExit"),
    "exit_in_a_message": (
        "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E",
        "EarlyExit",
    ),
    "exit_of_a_class_name": (
        "class M(type):\n    __name__ = property(lambda self: os._exit(0))\nclass E(Exception, metaclass=M): pass\nraise E",
        "EarlyExit",
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaving_is_not_succeeding(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body, failure = LEAVES[name]
    outcome = box.merge(program(body), model_dict)
    assert (outcome.status, outcome.failure, outcome.tensor) == ("crashed", failure, None)


RAISES = {
    "system_exit": ("sys.exit(0)", "SystemExit"),
    "keyboard_interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "generator_exit": ("raise GeneratorExit", "GeneratorExit"),
    "message_raises": (
        "class E(Exception):\n    def __str__(self): raise E\nraise E",
        "Exception",
    ),
    "message_is_no_string": (
        "class E(Exception):\n    def __str__(self): return 3\nraise E",
        "Exception",
    ),
    "message_is_a_strange_string": (
        "class S(str):\n    def __getitem__(self, i): raise SystemExit\n    def split(self): raise SystemExit\n"
        "class E(Exception):\n    def __str__(self): return S('x' * 5000)\nraise E",
        "Exception",
    ),
    "class_name_raises": (
        "class M(type):\n    __name__ = property(lambda self: 1 / 0)\nclass E(Exception, metaclass=M): pass\nraise E",
        "Exception",
    ),
    "class_name_with_controls": ("raise type('\\x1b[31mok\\n', (Exception,), {})", "Exception"),
    "class_name_too_long": ("raise type('E' * 5000, (Exception,), {})", "Exception"),
    "raises_a_class_that_lies": (
        "class E(Exception):\n    __class__ = property(lambda self: SystemExit)\nraise E",
        "Exception",
    ),
    "class_of_a_library": ("torch.linalg.inv(torch.zeros(2, 2))", "Exception"),
    "class_of_python": ("raise TimeoutError", "TimeoutError"),
}


@pytest.mark.parametrize("name", RAISES)
def test_any_exception_is_an_error(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body, failure = RAISES[name]
    first, second = box.merge_many(program(body), [model_dict, model_dict])
    assert (first.status, first.failure) == ("error", failure), first
    assert second == first or second.failure == failure


MESSAGES = {
    "huge": "raise ValueError('x' * 10**6)",
    "control_characters": "raise ValueError('\\x1b[2J\\r\\n\\x00\\x07bell')",
    "direction_marks": "raise ValueError('\\u202e\\u2066gnidaelsim\\u200b')",
    "lone_surrogates": "raise ValueError('\\ud800' * 500)",
    "astral": "raise ValueError('\\U0001f600' * 5000)",
    "address": "raise ValueError(object())",
    "invisible": "raise ValueError('\\u3164\\u2800\\u00ad\\u034f' * 9)",
    "piled_up": "raise ValueError('a' + '\\u0301' * 200)",
    "right_to_left": "raise ValueError('\\u05d0\\u05d1')",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_short_clean_and_repeatable(
    name: str, box: Sandbox, strict_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    outcome = box.merge(program(MESSAGES[name]), model_dict)
    assert (outcome.status, outcome.failure) == ("error", "ValueError")
    assert len(outcome.error) <= 300
    assert outcome.error.isprintable()
    assert outcome.error.isascii()
    assert strict_box.merge(program(MESSAGES[name]), model_dict).error == outcome.error


FORGERIES = {
    "ok_with_nan": "results[-4:] = struct.pack('<f', float('nan'))\n"
    "record = Record(State.DONE, 'ok', '', '', 0.0)",
    "ok_and_infinite_time": "record = Record(State.DONE, 'ok', '', '', float('inf'))",
    "ok_and_negative_time": "record = Record(State.DONE, 'ok', '', '', -1e9)",
    "ok_and_no_time": "record = Record(State.DONE, 'ok', '', '', float('nan'))",
    "timeout": "record = Record(State.DONE, 'timeout', 'Timeout', '', 0.0)",
    "crashed": "record = Record(State.DONE, 'crashed', 'Signal SIGKILL', '', 0.0)",
    "unknown_status": "record = Record(State.DONE, 'winner', '', '', 0.0)",
    "control_characters": "record = Record(State.DONE, 'error', '\\x1b[31m', '\\x1b[2J\\n' * 100, 0.0)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_says_nothing_that_could_not_be_returned(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    body = (
        JAIL
        + "struct = sys.modules['struct']\n"
        + FORGERIES[name]
        + "\nresults[: Record.SIZE] = record.pack()\nos._exit(0)"
    )
    outcome = box.merge(program(body), model_dict)
    # Claiming `ok` is worth no more than returning the zeros that lie in the result file.
    if outcome.ok:
        assert outcome.tensor is not None
        assert torch.equal(outcome.tensor, torch.zeros(12, 8))
    assert outcome.status in (Status.OK, Status.ERROR, Status.BAD_OUTPUT)
    assert outcome.error.isprintable()
    assert outcome.failure.isprintable()
    assert 0 <= outcome.seconds < math.inf


def test_garbage_all_over_the_result_file_is_bad_output(
    box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    for byte in (1, 2, 255):
        body = JAIL + f"results[:] = bytes([{byte}]) * len(results)\nos._exit(0)"
        outcome = box.merge(program(body), model_dict)
        assert outcome.status in ("bad_output", "crashed"), outcome


def test_done_records_do_not_excuse_a_hang(strict_box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body = JAIL + (
        "record = Record(State.DONE, 'ok', '', '', 0.0).pack()\n"
        "for i in range(2): results[i * Record.SIZE : (i + 1) * Record.SIZE] = record\nwhile True: pass"
    )
    statuses = [outcome.status for outcome in strict_box.merge_many(program(body), [model_dict] * 2)]
    assert statuses == ["ok", "timeout"]


def test_the_result_file_cannot_be_shrunk_or_grown(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body = JAIL + "results.obj.resize(1)"
    outcome = box.merge(program(body), model_dict)
    assert outcome.status == "error", outcome
    body = (
        JAIL
        + "ctypes = sys.modules['ctypes']\ngot = any(ctypes.CDLL(None).ftruncate(fd, 0) == 0 for fd in range(99))"
    )
    outcome = box.merge(program(body), model_dict)
    assert outcome.tensor is not None
    assert not outcome.tensor.any()


def test_raising_the_jails_own_exceptions_gains_nothing(
    box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    body = JAIL + "raise jail['__jail__.layers'].LayerMissing('no Landlock here')"
    assert box.merge(program(body), model_dict).failure == "Exception"
    body = JAIL + "raise jail['__jail__.program'].BadOutput('Timeout', 'x')"
    outcome = box.merge(program(body), model_dict)
    assert (outcome.status, outcome.failure) == ("bad_output", "ForgedRecord")


# Every class that the jail itself gives, and one that it does not.
OURS = [
    *("Timeout", "CpuTime", "EarlyExit", "Signal SIGSEGV", "OutOfMemory", "ForgedRecord"),
    *("NonFinite", "NotATensor", "ShapeMismatch", "DtypeMismatch", "DeviceMismatch"),
    *("SourceTooLong", "TooComplex", "ImportNotAllowed", "NoEntryPoint", "WrongSignature", "SomethingElse"),
]


@pytest.mark.parametrize("name", OURS)
def test_no_program_names_its_failure_as_the_jail_would(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    raised = box.merge(program(f"raise type({name!r}, (Exception,), {{}})('words')"), model_dict)
    assert (raised.status, raised.failure, raised.error) == ("error", "Exception", f"{name}: words (line 6)")
    body = JAIL + f"record = Record(State.DONE, 'error', {name!r}, 'words', 0.0)\n"
    written = box.merge(program(body + "results[: Record.SIZE] = record.pack()\nos._exit(0)"), model_dict)
    assert (written.status, written.failure, written.error) == ("error", "Exception", "words")


@pytest.mark.parametrize("status", ["rejected", "memory", "bad_output"])
def test_a_failure_that_the_jail_does_not_give_is_a_forgery(
    status: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    body = JAIL + f"record = Record(State.DONE, {status!r}, 'Timeout', 'words', 0.0)\n"
    outcome = box.merge(program(body + "results[: Record.SIZE] = record.pack()\nos._exit(0)"), model_dict)
    assert (outcome.status, outcome.failure) == ("bad_output", "ForgedRecord")


def test_a_program_may_say_that_it_lacks_memory(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    outcome = box.merge(program("raise MemoryError"), model_dict)
    assert (outcome.status, outcome.failure) == ("memory", "OutOfMemory")  # as documented


def test_writing_to_any_descriptor_reaches_no_one(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    body = "for fd in range(3, 1024):\n    try:\n        os.write(fd, b'ready'); got = True\n    except OSError: pass"
    outcome = box.merge(program(body), model_dict)
    assert outcome.tensor is not None
    assert not outcome.tensor.any()


def test_inputs_are_the_childs_own_copy(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in model_dict.items()}
    source = (
        "import torch\ndef merge_models(model_dict, device):\n    seen = model_dict['a'].clone()\n"
        "    for tensor in model_dict.values(): tensor.fill_(7)\n    return seen"
    )
    outcomes = box.merge_many(source, [model_dict, model_dict])
    for outcome in outcomes:
        assert outcome.tensor is not None
        assert torch.equal(outcome.tensor, before["a"])
    assert all(torch.equal(model_dict[name], before[name]) for name in before)


PATCHES = {
    "isfinite": "torch.isfinite = lambda x: torch.ones(1, dtype=torch.bool)",
    "is_tensor": "torch.Tensor.is_complex = lambda self: False",
    "shape": "torch.Tensor.shape = property(lambda self: (12, 8))",
    "copy": "torch.Tensor.copy_ = lambda self, other: self",
    "frombuffer": "torch.frombuffer = lambda *a, **k: torch.zeros(96)",
    "clock": "sys.modules['time'].perf_counter = lambda: 1e300",
    "exit": "sys.modules['posix']._exit = os._exit = lambda code: None",
    "record": "sys.modules['__jail__.job'].Record.pack = lambda self: bytes(1296)",
    "builtins": "sys.modules['builtins'].isinstance = lambda *a: True",
    "json": "sys.modules['json'].loads = None",
    "hash_seed": "os.environ['PYTHONHASHSEED'] = '1'",
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_passes_no_nan_and_dies_with_its_child(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    source = f"import torch\nsys = torch.sys\nos = torch.os\n{PATCHES[name]}\n" + (
        "def merge_models(model_dict, device):\n    return model_dict['a'] * float('nan')"
    )
    outcome = box.merge(source, model_dict)
    assert not outcome.ok or bool(torch.isfinite(outcome.tensor).all())  # type: ignore[arg-type]
    after = box.merge(GOOD, model_dict)
    assert after.tensor is not None
    assert torch.equal(after.tensor, model_dict["a"])
    assert 0 <= after.seconds < 20


OUTPUTS = {
    "nan": ("model_dict['a'] * float('nan')", "NonFinite"),
    "infinity": ("model_dict['a'] / 0", "NonFinite"),
    "one_nan": (
        "torch.cat([model_dict['a'].flatten()[:-1], torch.tensor([float('nan')])]).view(12, 8)",
        "NonFinite",
    ),
    "too_large_for_float32": ("torch.full((12, 8), 1e300, dtype=torch.float64)", "NonFinite"),
    "complex": ("model_dict['a'] * 1j", "DtypeMismatch"),
    "quantised": ("torch.quantize_per_tensor(model_dict['a'], 0.1, 0, torch.qint8)", "DtypeMismatch"),
    "transposed": ("model_dict['a'].T", "ShapeMismatch"),
    "scalar": ("model_dict['a'].sum()", "ShapeMismatch"),
    "larger": ("torch.zeros(10000, 1000)", "ShapeMismatch"),
    "extra_dimension": ("model_dict['a'].unsqueeze(0)", "ShapeMismatch"),
    "none": ("None", "NotATensor"),
    "number": ("0.0", "NotATensor"),
    "dictionary": ("model_dict", "NotATensor"),
    "list": ("model_dict['a'].tolist()", "NotATensor"),
    "array": ("model_dict['a'].numpy()", "NotATensor"),
    "generator": ("(x for x in model_dict.values())", "NotATensor"),
    "meta": ("torch.empty(12, 8, device='meta')", "DeviceMismatch"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_output_is_named(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    value, failure = OUTPUTS[name]
    source = f"import torch\ndef merge_models(model_dict, device):\n    return {value}"
    outcome = box.merge(source, model_dict)
    assert (outcome.status, outcome.failure, outcome.tensor) == ("bad_output", failure, None), outcome


LIARS = {
    "subclass_that_lies_about_its_shape": "class Liar(torch.Tensor):\n    shape = property(lambda self: (12, 8))\n"
    "value = torch.zeros(3).as_subclass(Liar)",
    "subclass_that_takes_over_functions": "class Liar(torch.Tensor):\n    @classmethod\n"
    "    def __torch_function__(cls, f, types, args=(), kwargs=None): return True\nvalue = torch.zeros(3).as_subclass(Liar)",
    "object_that_lies_about_its_class": "class Liar:\n    __class__ = torch.Tensor\n    shape = (12, 8)\n"
    "    def __getattr__(self, name): return lambda *a, **k: self\nvalue = Liar()",
    "nested_tensor": "value = torch.nested.nested_tensor([torch.zeros(8)] * 12)",
    "wild_strides": "value = torch.as_strided(torch.zeros(1), (12, 8), (0, 0))",
    "freed_storage": "value = torch.zeros(12, 8)\nvalue.untyped_storage().resize_(0)",
}


@pytest.mark.parametrize("name", LIARS)
def test_a_lying_output_gives_nothing_but_finite_numbers(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    source = f"import torch\n{LIARS[name]}\ndef merge_models(model_dict, device):\n    return value"
    outcome = box.merge(source, model_dict)
    if outcome.ok:
        assert outcome.tensor is not None
        assert type(outcome.tensor) is torch.Tensor
        assert outcome.tensor.shape == (12, 8)
        assert outcome.tensor.dtype == torch.float32
        assert bool(torch.isfinite(outcome.tensor).all())
    assert box.merge(GOOD, model_dict).ok


DEFINITIONS = {
    "exit_in_the_module": ("torch.os._exit(0)\n" + GOOD, "crashed"),
    "exit_in_a_decorator": ("@lambda f: torch.os._exit(0)\n" + GOOD, "crashed"),
    "exit_in_a_default": (
        "def merge_models(model_dict, device, context=torch.os._exit(0)):\n    return 1",
        "crashed",
    ),
    "exit_in_a_class": ("class A:\n    torch.os._exit(0)\n" + GOOD, "crashed"),
    "exit_in_an_annotation": (
        "def merge_models(model_dict: torch.os._exit(0), device):\n    return 1",
        "crashed",
    ),
    "loop_in_the_module": ("while True: pass\n" + GOOD, "timeout"),
    "system_in_the_module": ("torch.os.system('touch $ROOM/new')\n" + GOOD, "ok"),
    "raise_in_the_module": ("1 / 0\n" + GOOD, "error"),
    "entry_deleted": (GOOD + "\ndel merge_models", "error"),
    "entry_replaced_by_a_number": (GOOD + "\nmerge_models = 3", "error"),
    "entry_replaced_by_exit": (GOOD + "\nmerge_models = torch.os._exit", "error"),
    "entry_twice": (GOOD + "\n" + GOOD, "rejected"),
    "entry_within_a_class": ("class A:\n    def merge_models(a, b):\n        return a", "rejected"),
    "entry_async": ("async def merge_models(model_dict, device):\n    return model_dict['a']", "rejected"),
    "entry_is_a_generator": (
        "def merge_models(model_dict, device):\n    yield model_dict['a']",
        "bad_output",
    ),
    "entry_without_parameters": ("def merge_models():\n    return 1", "rejected"),
    "entry_with_too_many": ("def merge_models(a, b, c, d):\n    return a", "rejected"),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_code_that_runs_at_definition_gains_nothing(
    name: str, strict_box: Sandbox, model_dict: dict[str, torch.Tensor], tmp_path: os.PathLike[str]
) -> None:
    source, status = DEFINITIONS[name]
    outcome = strict_box.merge("import torch\n" + source.replace("$ROOM", str(tmp_path)), model_dict)
    assert outcome.status == status, outcome
    assert os.listdir(tmp_path) == []


IMPORTS = {
    "os": "import os",
    "as": "import subprocess as torch",
    "from": "from os import system",
    "submodule": "import os.path",
    "relative": "from . import torch",
    "within_a_function": "def f():\n    import socket",
    "after_an_allowed_one": "import math, ctypes",
    "look_alike": "import torch_os",
    "numpy": "import numpy as np",
}


@pytest.mark.parametrize("name", IMPORTS)
def test_import_is_rejected_with_its_name(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    outcome = box.merge(f"{IMPORTS[name]}\n{GOOD}", model_dict)
    assert (outcome.status, outcome.failure) == ("rejected", "ImportNotAllowed")


# The syntax check sees none of these; each reaches a module that it forbids, and the layers below stop what
# it does.
ESCAPES = {
    "torch_os": "got = torch.os.read(torch.os.open('$ROOM/secret', 0), 99)",
    "dunder_import": "got = __import__('os').listdir('$ROOM')",
    "importlib": "got = torch.sys.modules['importlib'].import_module('os').listdir('$ROOM')",
    "loader_of_builtins": "got = len.__self__.__loader__.load_module('posix').listdir('$ROOM')",
    "subclasses": "wrap = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]\n"
    "got = wrap.__init__.__globals__['system']('echo > $ROOM/new') == 0",
    "eval": 'got = eval(\'__import__("os").listdir("$ROOM")\')',
    "globals_of_torch": "got = torch.nn.Module.__init__.__globals__['__builtins__']['open']('$ROOM/secret').read()",
    "globals_of_functools": "import functools\n"
    "got = functools.wraps.__globals__['__builtins__']['open']('$ROOM/secret').read()",
    "hub": "torch.hub.download_url_to_file('file://$ROOM/secret', '$ROOM/new', progress=False); got = True",
    "load_library": "torch.ops.load_library('$ROOM/library.so'); got = True",
    "load_classes": "torch.classes.load_library('$ROOM/library.so'); got = True",
    "dlopen": "got = torch.sys.modules['ctypes'].CDLL('$ROOM/library.so')",
    "trace_file": "with torch.autograd.profiler.profile() as trace: torch.ones(2) + 1\n"
    "trace.export_chrome_trace('$ROOM/new'); got = os.path.exists('$ROOM/new')",
    "shared_storage": "got = torch.zeros(3).share_memory_().is_shared()",
    "storage_from_file": "got = torch.UntypedStorage.from_file('$ROOM/secret', False, 4)[0]",
    "multiprocessing": "process = torch.multiprocessing.get_context('fork').Process(target=open, args=('$ROOM/new', 'w'))\n"
    "process.start(); process.join(); got = os.path.exists('$ROOM/new')",
    "distributed": "got = torch.distributed.TCPStore('127.0.0.1', 0, 1, True).port",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_reaching_a_module_is_not_reaching_the_machine(
    name: str, box: Sandbox, room: Room, model_dict: dict[str, torch.Tensor]
) -> None:
    shutil.copy(_ctypes.__file__, room.path / "library.so")
    room.remember()
    source = program(ESCAPES[name], ROOM=room.path)
    assert succeeds_outside(source), "the attack does not work even without a jail"
    (room.path / "new").unlink(missing_ok=True)
    room.remember()
    outcome = box.merge(source, model_dict)
    assert not succeeded(outcome), outcome
    assert room.untouched


def test_the_environment_is_scrubbed(
    model_dict: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_TOKEN", SECRET)
    with Sandbox() as own:
        body = (
            "environment = str(dict(os.environ)) + str(os.environb)\n"
            "libc = sys.modules['ctypes'].CDLL(None)\nlibc.getenv.restype = sys.modules['ctypes'].c_char_p\n"
            "got = 'CANARY' in environment or libc.getenv(b'CANARY_TOKEN')"
        )
        outcome = own.merge(program(body), model_dict)
    assert outcome.tensor is not None
    assert not outcome.tensor.any()


def test_the_forkserver_holds_nothing_of_the_parent(
    box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    planted = "planted-" + SECRET  # lives in this process alone
    body = (
        "gc = sys.modules['gc']\nparts = ('planted', 'the-canary-sings')\n"
        "got = any(isinstance(o, str) and o == '-'.join(parts) for h in gc.get_objects() for o in gc.get_referents(h))"
    )
    outcome = box.merge(program(body), model_dict)
    assert outcome.tensor is not None, outcome
    assert not outcome.tensor.any()
    assert planted
    loaded = (
        "got = [name for name in sys.modules if name.partition('.')[0] in ('selfdev', 'pytest', '_pytest')]"
    )
    outcome = box.merge(program(loaded), model_dict)
    assert outcome.tensor is not None
    assert not outcome.tensor.any()
