"""Models fetched from a Hub: a server on this machine that answers as the Hub does, asked by the whole command."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import TENSORS, UP, read, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves folders `OWNER/NAME` of a folder, and remembers which files were fetched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            """Answers what the Hub's client asks: what a repository holds, and a file."""

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                match self.path.partition("?")[0].strip("/").split("/"):
                    case ["api", "models", owner, name, "tree", *_]:
                        files = sorted((hub.root / owner / name).iterdir())
                        listed = [
                            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                            for file in files
                        ]
                        content = json.dumps(listed).encode()
                    case ["api", "models", owner, name, *_]:
                        files = sorted((hub.root / owner / name).iterdir())
                        siblings = [{"rfilename": file.name} for file in files]
                        told = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                        content = json.dumps(told).encode()
                    case [owner, name, "resolve", _, file]:
                        content = (hub.root / owner / name / file).read_bytes()
                        if body:
                            hub.fetched.append(f"{name}/{file}")
                    case _:
                        self.send_error(404)
                        return
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    serving = Hub(tmp_path / "hub")
    thread = threading.Thread(target=serving.server.serve_forever)
    thread.start()
    yield serving
    serving.server.shutdown()
    serving.server.server_close()
    thread.join()


def test_pickled_weights_and_adapters_come_from_the_hub_and_nothing_else_does(
    hub: Hub, tmp_path: Path
) -> None:
    seed = write(hub.root / "lab" / "seed")
    torch.save(TENSORS, seed / "pytorch_model.bin")
    (seed / "model.safetensors").unlink()  # only the pickle is there
    (seed / "training_args.bin").write_bytes(b"no weights")

    whole = write(hub.root / "lab" / "whole", {UP: TENSORS[UP] + 1})
    shutil.copy(seed / "pytorch_model.bin", whole)  # beside safetensors it is not wanted
    (whole / "optimizer.pt").write_bytes(b"no weights")
    (seed / "LICENSE").write_text("of the seed")

    adapter = hub.root / "lab" / "lora"
    adapter.mkdir()
    left, right = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[3.0, 1.0]])
    module = f"base_model.model.{UP.removesuffix('.weight')}"
    save_file(
        {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "lab/seed"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    other = hub.root / "lab" / "pickled-lora"
    other.mkdir()
    torch.save(
        {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}, other / "adapter_model.bin"
    )
    shutil.copy(adapter / "adapter_config.json", other)

    experts = [f"whole=lab/whole@{COMMIT}", "lora=lab/lora", "pickled=lab/pickled-lora+lab/seed"]
    given = [word for expert in experts for word in ("--expert", expert)]
    merge = ["merge", "--method", "task_arithmetic", "--seed", "lab/seed", *given, "-p", "scale=1.0"]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-P", "-m", "selfdev", *merge, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = TENSORS[UP] + 1 + 2 * (2 * left @ right)
    torch.testing.assert_close(read(tmp_path / "out")[UP], expected)
    assert (tmp_path / "out" / "LICENSE").read_text() == "of the seed"
    assert sorted(hub.fetched) == [
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
        "pickled-lora/adapter_config.json",
        "pickled-lora/adapter_model.bin",
        "seed/LICENSE",
        "seed/config.json",
        "seed/pytorch_model.bin",
        "whole/config.json",
        "whole/model.safetensors",
    ]
