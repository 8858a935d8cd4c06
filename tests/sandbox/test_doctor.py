"""`selfdev doctor`: every layer is probed for real, and what is missing comes with a way out."""

import http.server
import json
import socket
import threading
from pathlib import Path

import pytest

from selfdev import doctor
from selfdev.doctor import Check


@pytest.fixture(scope="module")
def found() -> dict[str, Check]:
    return {check.name: check for check in doctor.checks()}


LAYERS = [
    *("memory files", "process descriptors", "session", "user", "parent-death signal", "undumpable"),
    *("resource limits", "writable memory", "no_new_privs", "Landlock", "seccomp", "all layers"),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_has_a_line(found: dict[str, Check], layer: str) -> None:
    check = found[f"jail: {layer}"]
    assert check.ok, check
    assert check.detail


@pytest.mark.parametrize("name", ["Python", "torch", "threads", "cache", "disk", "models"])
def test_the_rest_of_the_machine_has_a_line(found: dict[str, Check], name: str) -> None:
    assert found[name].detail


def test_the_report_is_one_line_each_and_a_remedy_where_one_is_needed() -> None:
    text = doctor.report([Check("a", True, "fine"), Check("long name", False, "gone", "bring it back")])
    assert text.splitlines() == [
        "ok      a          fine",
        "MISSING long name  gone",
        "                   -> bring it back",
    ]


def test_json_says_all_of_it() -> None:
    parsed = json.loads(doctor.report([Check("a", False, "gone", "bring it back")], as_json=True))
    assert parsed == {
        "ok": False,
        "checks": [{"name": "a", "ok": False, "detail": "gone", "remedy": "bring it back"}],
    }


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", "/proc/nowhere")
    check = doctor.cache()
    assert not check.ok
    assert "/proc/nowhere" in check.detail
    assert "SELFDEV_CACHE" in check.remedy


def test_cached_models_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache" / "smol").mkdir(parents=True)
    (tmp_path / "cache" / "smol" / "config.json").touch()
    (tmp_path / "hf" / "hub" / "models--org--name").mkdir(parents=True)
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert doctor.models().detail == "org/name, smol"


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_endpoint_is_asked() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        there, elsewhere = doctor.endpoint(f"{address}/v1"), doctor.endpoint(f"{address}/v2/")
        server.shutdown()
    with socket.socket() as taken:  # by nobody who listens
        taken.bind(("127.0.0.1", 0))
        gone = doctor.checks(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")[-1]
    assert (there.ok, elsewhere.ok, gone.ok) == (True, False, False)
    assert "/v1" in elsewhere.remedy
    assert "start the server" in gone.remedy
