"""Attacks on the network: no server, not even one on this machine, hears anything.

Each attack runs first without a jail, where the canary's server must hear it.
"""

import pytest
import torch
from canaries import Listeners, program, repelled, succeeds_outside

from selfdev.sandbox import Sandbox

# `socket` is no module that a program can import, but torch has loaded it, or its core in C.
SOCKET = "socket = sys.modules.get('socket') or sys.modules['_socket']\n"
CTYPES = "ctypes = sys.modules['ctypes']; libc = ctypes.CDLL(None)\n"
ADDRESS = (
    "address = (2).to_bytes(2, 'little') + ($UDP).to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)\n"
)

REACHES = {
    "tcp_connect": SOCKET + "s = socket.socket(2, 1); s.connect(('127.0.0.1', $TCP)); got = True",
    "tcp_connect_by_ctypes": CTYPES
    + ADDRESS.replace("$UDP", "$TCP")
    + "s = libc.socket(2, 1, 0)\ngot = s >= 0 and libc.connect(s, address, 16) == 0",
    "udp_send": SOCKET + "s = socket.socket(2, 2); got = s.sendto(b'key', ('127.0.0.1', $UDP))",
    "udp_connect_and_write": SOCKET
    + "s = socket.socket(2, 2); s.connect(('127.0.0.1', $UDP)); got = os.write(s.fileno(), b'key')",
    "udp_by_ctypes": CTYPES
    + ADDRESS
    + "s = libc.socket(2, 2, 0)\ngot = libc.sendto(s, b'key', 3, 0, address, 16) == 3",
    "unix_path": SOCKET + "s = socket.socket(1, 1); s.connect('$UNIX'); got = True",
    "unix_abstract": SOCKET + "s = socket.socket(1, 1); s.connect('\\0$ABSTRACT'); got = True",
}

OPENS = {
    "tcp_listen": SOCKET + "s = socket.socket(2, 1); s.bind(('127.0.0.1', 0)); s.listen(1); got = True",
    "udp_bind": SOCKET + "s = socket.socket(2, 2); s.bind(('127.0.0.1', 0)); got = True",
    "tcp6_socket": SOCKET + "got = socket.socket(10, 1) is not None",
    "netlink": SOCKET + "got = socket.socket(16, 3, 0) is not None",
    "socket_pair": SOCKET + "got = socket.socketpair() is not None",
    "host_name": SOCKET + "got = socket.gethostname()",
    "resolver": SOCKET + "got = socket.getaddrinfo('localhost', 80)",
    "io_uring": CTYPES + "got = libc.syscall(425, 4, ctypes.create_string_buffer(120)) >= 0",
}
MAY_BE_CLOSED_OUTSIDE = {"tcp6_socket", "io_uring"}  # some machines have them switched off


@pytest.mark.parametrize("name", REACHES)
def test_no_server_is_reached(
    name: str, box: Sandbox, listeners: Listeners, model_dict: dict[str, torch.Tensor]
) -> None:
    source = program(REACHES[name], **listeners.places)
    assert succeeds_outside(source), "the attack does not work even without a jail"
    assert listeners.heard(patience=20)
    outcome = box.merge(source, model_dict)
    assert repelled(outcome), outcome
    assert not listeners.heard(patience=0.3)


@pytest.mark.parametrize("name", OPENS)
def test_no_socket_is_made(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    source = program(OPENS[name])
    if not succeeds_outside(source):
        assert name in MAY_BE_CLOSED_OUTSIDE, "the attack does not work even without a jail"
        pytest.skip("this machine has it switched off")
    outcome = box.merge(source, model_dict)
    assert repelled(outcome), outcome
