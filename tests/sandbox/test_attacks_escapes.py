"""Ways out through modules that are within reach, and what the forkserver could give away."""

import _ctypes
import shutil

import pytest
import torch
from canaries import SECRET, Room, program, succeeded, succeeds_outside

from selfdev.sandbox import Sandbox

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
