"""How parent and forkserver talk: JSON with its length before it, descriptors beside it.

Nothing is unpickled. The two trust each other; no candidate's process ever holds an end. Who is interrupted
while sending or receiving may leave half a message behind, and must not use the connection again.
"""

import array
import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
_LONGEST = 1 << 20
_MOST_DESCRIPTORS = 8


class Hangup(Exception):
    """The other side closed its end, or what comes from it is no message."""


def send(connection: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send one message and copies of some descriptors.

    Raises:
        Hangup: where the other side is gone.
    """
    body = json.dumps(message).encode()
    frame = _LENGTH.pack(len(body)) + body
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        sent = connection.sendmsg([frame], rights)
        connection.sendall(frame[sent:])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Hangup from error


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Wait for one message; the descriptors are close-on-exec and belong to the caller.

    Raises:
        Hangup: where the other side is gone.
    """
    try:
        # The descriptors travel with the first byte of their frame.
        start, descriptors, _, _ = socket.recv_fds(
            connection, _LENGTH.size, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if not start:
            raise Hangup
        (length,) = _LENGTH.unpack(start + _exactly(connection, _LENGTH.size - len(start)))
        if length > _LONGEST:
            raise Hangup(f"a message of {length} bytes")
        return json.loads(_exactly(connection, length)), list(descriptors)
    except ConnectionResetError as error:
        raise Hangup from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(size)
        if not part:
            raise Hangup
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
