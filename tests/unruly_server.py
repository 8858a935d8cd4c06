"""A server of OpenAI's protocol on a real socket, which misbehaves as it is told and keeps count."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import PreTrainedTokenizerBase

from scripted import PROGRAMS
from selfdev.algorithms.source import OPENING, wrap_short

TOKENS = 40
"""What every program costs that this server counts by itself: 30 in, 10 out."""


class UnrulyServer:
    """Serves on a free port of this machine, from `start` to `stop`; then it may start again on the same one.

    Args:
        programs: short programs, dealt out by the request's seed.
        tokenizer: with one, it does what vLLM does: it tells token ids, and loads adapters.
        misdeeds: taken one a request, first to last; after them it behaves. A number is a status.
        key: the bearer token that it wants, and gladly repeats.
    """

    def __init__(
        self,
        programs: list[str] = PROGRAMS,
        tokenizer: PreTrainedTokenizerBase | None = None,
        misdeeds: list[str] | None = None,
        key: str = "",
    ):
        self.programs = programs
        self.tokenizer = tokenizer
        self.misdeeds = list(misdeeds or [])
        self.key = key
        self.retry_after = "0"
        self.die_after: int | None = None
        self.refused: set[int] = set()
        """Seeds of requests that it answers with 400, always."""
        self.counts = True
        self.unknown_fields: set[str] = set()
        self.only_messages = False
        self.wants_room = False
        self.trials = ""
        """Whether one token is too few for its thoughts."""
        self.asked: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        """Requests for one token."""
        self.arrived: list[float] = []
        self.answered: list[dict[str, Any]] = []
        self.adapters: dict[str, str] = {}
        self.loaded: list[str] = []
        self.refuses_adapters = False
        self.closed_until = 0.0
        self.too_early = 0
        self.port = 0
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> "UnrulyServer":
        unruly = self
        self.released.clear()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                unruly.listing(self)

            def do_POST(self) -> None:
                unruly.post(self)

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def stop(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> "UnrulyServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- what it answers

    def listing(self, to: BaseHTTPRequestHandler) -> None:
        if not self.admits(to):
            return
        names = ["unruly", *self.adapters]
        reply(to, 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def post(self, to: BaseHTTPRequestHandler) -> None:
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        if not self.admits(to):
            return
        if to.path.endswith("lora_adapter") and not self.refuses_adapters:
            self.adapt(to, body)
        elif to.path.endswith("completions"):
            if 1 in (body.get("max_tokens"), body.get("max_completion_tokens")):
                self.probes.append(body)
                if not self.misbehave(to, self.understands(to.path, body)):
                    self.complete(to, body)
                return
            if body.get("prompt") == "def" or (body.get("messages") or [{}])[0].get("content") == "def":
                self.probes.append(body)  # with all the room that a program has
                if not self.misbehave(to, "" if self.wants_room else self.understands(to.path, body)):
                    self.complete(to, body)
                return
            self.asked.append(body)
            self.arrived.append(time.monotonic())
            misdeed = self.misdeeds.pop(0) if self.misdeeds else ""
            misdeed = "400" if body.get("seed") in self.refused else misdeed
            if not self.misbehave(to, misdeed):
                self.complete(to, body)
        else:
            reply(to, 404, {"detail": "Not Found"})

    def understands(self, path: str, body: dict[str, Any]) -> str:
        """The misdeed with which it answers a trial, or what is not its dialect; none if it is."""
        if self.trials:
            return self.trials
        if self.wants_room:
            return "400"
        if self.only_messages and not path.endswith("chat/completions"):
            return "404"
        return "400" if self.unknown_fields & body.keys() else ""

    def admits(self, to: BaseHTTPRequestHandler) -> bool:
        if not to.path.startswith("/v1/"):
            reply(to, 404, {"detail": "Not Found"})
            return False
        said = to.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.key and said != self.key:
            reply(to, 401, {"error": {"message": f"no such key: {said}"}})
            return False
        return True

    def adapt(self, to: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        if "unload" not in to.path:
            self.adapters[name] = body["lora_path"]
            self.loaded.append(name)
        elif self.adapters.pop(name, None) is None:
            reply(to, 404, {"error": {"message": f"The lora adapter '{name}' cannot be found."}})
            return
        to.send_response(200)
        to.end_headers()
        to.wfile.write(b"Success: it is done.")

    def misbehave(self, to: BaseHTTPRequestHandler, misdeed: str) -> bool:
        """Whether the request is dealt with by that."""
        if time.monotonic() < self.closed_until:
            self.too_early += 1
        if self.die_after is not None and len(self.answered) >= self.die_after:
            misdeed = "cut"
        if misdeed == "429":
            self.closed_until = time.monotonic() + float(self.retry_after)
            reply(to, 429, {"error": {"message": "slow down"}}, {"Retry-After": self.retry_after})
        elif misdeed == "slow":
            self.released.wait(30)
        elif misdeed == "cut":
            to.send_response(200)
            to.send_header("Content-Type", "application/json")
            to.send_header("Content-Length", "5000")
            to.end_headers()
            to.wfile.write(b'{"choices": [{"text": "a(del')
        elif misdeed == "garbage":
            reply(to, 200, b"<html>It works!</html>")
        elif misdeed == "provider":
            reply(to, 200, {"error": {"message": "the provider behind says: context too long"}})
        elif misdeed == "empty":
            reply(to, 200, {"choices": []})
        elif misdeed == "endless":
            to.send_response(200)
            to.end_headers()
            try:
                for _ in range(40):
                    to.wfile.write(b" " * 1024**2)
            except OSError:
                pass  # the client has heard enough
        elif misdeed.isdigit():
            reply(to, int(misdeed), {"error": {"message": f"\x1b[31mno\n{to.headers.get('Authorization')}"}})
        return bool(misdeed)

    def complete(self, to: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if body["model"] not in ("unruly", *self.adapters):
            reply(to, 404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        program = self.programs[body["seed"] % len(self.programs)]
        if "messages" in body:
            text = f"Here it is:\n```python\n{wrap_short(OPENING + program)}```\n"
            choice: dict[str, Any] = {
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        else:
            text = program + "\n\ndef another():\n"
            choice = {"text": text, "finish_reason": "stop"}
        usage = {"prompt_tokens": 30, "completion_tokens": 10}
        if self.tokenizer is not None:
            ids = self.tokenizer(text).input_ids
            choice["token_ids"] = ids
            choice["logprobs"] = {"token_logprobs": [-0.5] * len(ids)}
            usage = {
                "prompt_tokens": len(self.tokenizer(body["prompt"]).input_ids),
                "completion_tokens": len(ids),
            }
        if not any(body is probe for probe in self.probes):
            self.answered.append(body)
        reply(to, 200, {"choices": [choice], **({"usage": usage} if self.counts else {})})


def reply(
    to: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str] | None = None
) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    to.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
        to.send_header(name, value)
    to.end_headers()
    to.wfile.write(data)
