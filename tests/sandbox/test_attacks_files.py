"""Attacks on files: nothing is read, listed, looked at, made, changed or removed.

Each attack runs first without a jail, where it must succeed (else it would prove nothing), and then in the
jail on a fresh room. The room is open to everybody, so no mode bit helps the jail.
"""

import platform
import tempfile
from pathlib import Path

import pytest
import torch
from canaries import Room, program, repelled, succeeds_outside

from selfdev.sandbox import Sandbox

CTYPES = "ctypes = sys.modules['ctypes']; libc = ctypes.CDLL(None)\n"

READS = {
    "builtin_open": "got = 'canary' in open('$ROOM/secret').read()",
    "os_open": "got = os.read(os.open('$ROOM/secret', os.O_RDONLY), 100)",
    "open_path_only": "got = os.open('$ROOM/secret', os.O_PATH)",
    "io_fileio": "got = torch.serialization.io.FileIO('$ROOM/secret').read()",
    "pathlib": "got = sys.modules['pathlib'].Path('$ROOM/secret').read_text()",
    "numpy_fromfile": "got = sys.modules['numpy'].fromfile('$ROOM/secret', dtype='uint8').size",
    "torch_from_file": "got = torch.from_file('$ROOM/secret', size=4, dtype=torch.uint8).any()",
    "torch_load": "got = torch.load('$ROOM/tensor.pt').shape",
    "libc_fopen": CTYPES + "libc.fopen.restype = ctypes.c_void_p\ngot = libc.fopen(b'$ROOM/secret', b'r')",
    "raw_openat": CTYPES + "got = libc.syscall(257, -100, b'$ROOM/secret', 0) > 0",
    "raw_openat2": CTYPES + "got = libc.syscall(437, -100, b'$ROOM/secret', bytes(24), 24) > 0",
    "list_folder": "got = os.listdir('$ROOM')",
    "scan_folder": "got = [entry.name for entry in os.scandir('$ROOM')]",
    "glob": "got = torch.serialization.os.walk('$ROOM').__next__()[2]",
    "stat": "got = os.stat('$ROOM/secret').st_size",
    "lstat": "got = os.lstat('$ROOM/link').st_mode",
    "raw_statx": CTYPES
    + "got = libc.syscall(332, -100, b'$ROOM/secret', 0, 0xfff, ctypes.create_string_buffer(256)) == 0",
    "access": "got = os.access('$ROOM/secret', os.R_OK)",
    "exists": "got = os.path.exists('$ROOM/secret')",
    "statvfs": "got = os.statvfs('$ROOM').f_blocks",
    "readlink": "got = os.readlink('$ROOM/link')",
    "getcwd": "got = os.getcwd()",
    "chdir": "got = os.chdir('$ROOM') is None",
    "list_attributes": "got = os.listxattr('$ROOM/secret') is not None",
    "own_environment_file": "got = open('/proc/self/environ', 'rb').read() is not None",
    "own_memory_map": "got = open('/proc/self/maps').read()",
    "password_file": "got = open('/etc/passwd').read()",
    "open_dev_mem_node": "got = open('/dev/zero', 'rb').read(1)",
    "import_from_folder": "sys.path.insert(0, '$ROOM')\nsys.meta_path[:] = [sys.modules['_frozen_importlib_external'].PathFinder]\n"
    "import importlib\ngot = importlib.import_module('planted').VALUE",
}

WRITES = {
    "new_file": "got = open('$ROOM/new', 'w').write('x')",
    "overwrite": "got = open('$ROOM/secret', 'w').write('x')",
    "append": "got = open('$ROOM/secret', 'a').write('x')",
    "truncate": "got = os.truncate('$ROOM/secret', 0) is None",
    "remove": "got = os.remove('$ROOM/secret') is None",
    "rename": "got = os.rename('$ROOM/secret', '$ROOM/stolen') is None",
    "make_folder": "got = os.mkdir('$ROOM/new') is None",
    "remove_folder": "got = os.rmdir('$ROOM/empty') is None",
    "symbolic_link": "got = os.symlink('/etc', '$ROOM/new') is None",
    "hard_link": "got = os.link('$ROOM/secret', '$ROOM/new') is None",
    "change_mode": "got = os.chmod('$ROOM/secret', 0o600) is None",
    "change_times": "got = os.utime('$ROOM/secret', (1, 1)) is None",
    "make_pipe": "got = os.mkfifo('$ROOM/new') is None",
    "torch_save": "got = torch.save(torch.zeros(2), '$ROOM/new') is None",
    "tofile": "got = torch.zeros(2).numpy().tofile('$ROOM/new') is None",
    "shared_mapping": "got = torch.from_file('$ROOM/secret', shared=True, size=4, dtype=torch.uint8).fill_(0) is not None",
    "raw_creat": CTYPES + "got = libc.syscall(85, b'$ROOM/new', 0o666) > 0",
    "raw_unlinkat": CTYPES + "got = libc.syscall(263, -100, b'$ROOM/secret', 0) == 0",
}

if platform.machine() != "x86_64":  # the raw attacks call by x86_64's numbers
    READS = {name: body for name, body in READS.items() if not name.startswith("raw_")}
    WRITES = {name: body for name, body in WRITES.items() if not name.startswith("raw_")}


def furnish(room: Room) -> Room:
    torch.save(torch.zeros(2), room.path / "tensor.pt")
    (room.path / "planted.py").write_text("VALUE = 1")
    room.remember()
    return room


@pytest.mark.parametrize("name", READS)
def test_nothing_is_read(name: str, box: Sandbox, room: Room, model_dict: dict[str, torch.Tensor]) -> None:
    source = program(READS[name], ROOM=furnish(room).path)
    assert succeeds_outside(source), "the attack does not work even without a jail"
    outcome = box.merge(source, model_dict)
    assert repelled(outcome), outcome


@pytest.mark.parametrize("name", WRITES)
def test_nothing_is_written(name: str, box: Sandbox, room: Room, model_dict: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as other:
        victim = furnish(Room(Path(other)))
        assert succeeds_outside(program(WRITES[name], ROOM=victim.path)), "the attack does not work"
        assert not victim.untouched
    outcome = box.merge(program(WRITES[name], ROOM=furnish(room).path), model_dict)
    assert repelled(outcome), outcome
    assert room.untouched
