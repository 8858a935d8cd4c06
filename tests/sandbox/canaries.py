"""Canaries: what an attack would steal, change or reach, and a way to see that an attack is one."""

import os
import select
import socket
import stat
import textwrap
from pathlib import Path

import torch

from selfdev.sandbox import Outcome

SECRET = "the-canary-sings"

GOOD = "def merge_models(model_dict, device):\n    return model_dict['a']"
SUM = "def merge_models(model_dict, device):\n    return sum(model_dict.values())"
ONE = {"a": torch.ones(2)}


class Room:
    """A folder that everybody may write to, with something to steal and something to destroy."""

    def __init__(self, path: Path):
        self.path = path
        path.chmod(0o777)
        (path / "secret").write_text(SECRET)
        (path / "full").mkdir()
        (path / "empty").mkdir()
        (path / "link").symlink_to("secret")
        for name in ("secret", "full", "empty"):
            (path / name).chmod(0o777)
        self.remember()

    def remember(self) -> None:
        """Take what is there now as what must stay."""
        self.before = self.state()

    def state(self) -> dict[str, tuple[int, int, int, float, bytes]]:
        """Everything an attack could change."""
        seen = {}
        for entry in sorted(self.path.rglob("*")):
            about = entry.lstat()
            content = entry.read_bytes() if stat.S_ISREG(about.st_mode) else b""
            seen[entry.name] = (about.st_mode, about.st_uid, about.st_nlink, about.st_mtime, content)
        return seen

    @property
    def untouched(self) -> bool:
        return self.state() == self.before


class Listeners:
    """Servers of every kind that hear whether anybody came."""

    def __init__(self, path: Path):
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.unix_path = str(path / "unix")
        self.unix.bind(self.unix_path)
        os.chmod(self.unix_path, 0o777)
        self.unix.listen()
        self.abstract = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.abstract_name = f"selfdev-canary-{os.getpid()}-{id(self)}"
        self.abstract.bind(f"\0{self.abstract_name}")
        self.abstract.listen()

    @property
    def places(self) -> dict[str, object]:
        """What an attack needs to know to reach them."""
        return {
            "TCP": self.tcp.getsockname()[1],
            "UDP": self.udp.getsockname()[1],
            "UNIX": self.unix_path,
            "ABSTRACT": self.abstract_name,
        }

    def heard(self, patience: float = 0.0) -> bool:
        """Whether anything arrived since the last time, or does so within some seconds."""
        arrived = False
        select.select([self.tcp, self.udp, self.unix, self.abstract], [], [], patience)
        for listener in (self.tcp, self.unix, self.abstract):
            listener.setblocking(False)
            try:
                listener.accept()[0].close()
                arrived = True
            except BlockingIOError:
                pass
        self.udp.setblocking(False)
        try:
            self.udp.recv(100)
            arrived = True
        except BlockingIOError:
            pass
        return arrived

    def close(self) -> None:
        for listener in (self.tcp, self.udp, self.unix, self.abstract):
            listener.close()


def program(body: str, **places: object) -> str:
    """A program that runs ``body`` and returns ones if it left something true in ``got``, else zeros."""
    for name, value in places.items():
        body = body.replace(f"${name}", str(value))
    return (
        "import torch\n\ndef merge_models(model_dict, device):\n    got = None\n"
        "    os, sys = torch.os, torch.sys\n"
        + textwrap.indent(textwrap.dedent(body).strip(), "    ")
        + "\n    return torch.full_like(model_dict['a'], 1.0 if got else 0.0)\n"
    )


def succeeded(outcome: Outcome) -> bool:
    """Whether the body of a `program` got what it wanted."""
    return outcome.tensor is not None and bool(outcome.tensor.any())


MISTAKES = {
    "AttributeError",
    "ImportError",
    "KeyError",
    "ModuleNotFoundError",
    "NameError",
    "SyntaxError",
    "TypeError",
}


def repelled(outcome: Outcome) -> bool:
    """Whether the body of a `program` was refused by the jail, and did not merely stumble over itself."""
    return not succeeded(outcome) and outcome.failure not in MISTAKES


def succeeds_outside(source: str) -> bool:
    """Run a `program` in a fork of this process, without a jail; one that fails here proves nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            namespace: dict[str, object] = {}
            exec(source, namespace)
            merged = namespace["merge_models"]({"a": torch.zeros(2)}, "cpu")  # type: ignore[operator]
            os.write(writing, b"1" if bool(merged.any()) else b"0")
        finally:
            os._exit(0)
    os.close(writing)
    answer = os.read(reading, 1)
    os.close(reading)
    os.waitpid(pid, 0)
    return answer == b"1"
