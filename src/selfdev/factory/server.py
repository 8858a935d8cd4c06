"""A server that speaks OpenAI's protocol: one request at a time, and what may be said of its failure.

Every failure is a `NoAnswer`, which knows whether to ask again and whether the server may bill it. A `Retry-After`
holds back all requests.

The key comes from the environment, is sent as a header and stands nowhere else: an error or an answer in which the
server repeats it is cleaned of it.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import httpx2
from pydantic import ValidationError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from selfdev.errors import SelfdevError, UserError
from selfdev.factory.journal import Answer
from selfdev.factory.protocol import Completion, Models, error_message, retry_after
from selfdev.settings import Endpoint

T = TypeVar("T")

_LARGEST = 16 * 1024**2
"""Bytes of a response; the longest programs with their log-probabilities take a hundredth of it."""
_BY_GATEWAYS = (502, 504, 520, 524)
"""What gateways answer, Cloudflare's too, that do not tell what the server behind them has done."""
_REASON = 300
"""Characters of a server's own words in an error."""
_SECRET = 8
"""Characters from which a key is looked for in programs: `EMPTY` and `none` are no secrets, and may be words."""


class NoAnswer(SelfdevError):
    """A request without a usable answer.

    Attributes:
        again: whether it may go better if it is sent again.
        billed: whether the server may have done the work all the same.
        status: of HTTP; None if no response came.
    """

    def __init__(self, message: str, *, again: bool, billed: bool, status: int | None = None):
        super().__init__(message)
        self.again = again
        self.billed = billed
        self.status = status

    @property
    def refuses(self) -> bool:
        """Whether it is this one request that the server does not take, by what it says."""
        return self.status in (400, 413, 422)


class Server:
    """A connection to the server, to be entered in one event loop.

    Args:
        settings: address, key, time-out and pace.

    Raises:
        UserError: the environment does not hold the key.
    """

    def __init__(self, settings: Endpoint):
        self.settings = settings
        self._key = _key(settings)
        self._pace = _Pace(settings.requests_a_minute)

    async def __aenter__(self) -> "Server":
        self._client = httpx2.AsyncClient(
            base_url=self.settings.url + "/",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=self.settings.timeout,
            limits=httpx2.Limits(max_connections=self.settings.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def models(self) -> list[str]:
        """Names of the models and adapters that the server lists.

        Raises:
            NoAnswer: it does not say.
        """
        content = await self._exchange("GET", "models")
        try:
            listed = Models.model_validate_json(content)
        except ValidationError:
            raise self._garbled("models", content) from None
        return [model.id for model in listed.data]

    async def complete(self, chat: bool, body: Mapping[str, Any]) -> Answer:
        """Ask for one program.

        Args:
            chat: by a message, or by a text that is continued.
            body: the request.

        Raises:
            NoAnswer: there is none.
        """
        path = "chat/completions" if chat else "completions"
        await self._pace.turn()
        began = time.perf_counter()
        content = await self._exchange("POST", path, body)
        taken = {"seconds": time.perf_counter() - began}
        try:
            answer = Completion.model_validate_json(content).answer().model_copy(update=taken)
        except (ValidationError, ValueError):
            raise self._garbled(path, content) from None
        if len(self._key) >= _SECRET and self._key in answer.text:
            clean = {"text": self._without_key(answer.text), "tokens": None, "log_probs": None}
            return answer.model_copy(update=clean)
        return answer

    async def load_adapter(self, name: str, folder: str) -> None:
        """Let vLLM load a LoRA adapter.

        Args:
            name: under which it is asked for from now on.
            folder: where it lies, as the server sees it.

        Raises:
            NoAnswer: it does not.
        """
        await self._exchange("POST", "load_lora_adapter", {"lora_name": name, "lora_path": folder})

    async def unload_adapter(self, name: str) -> None:
        """Let vLLM forget a LoRA adapter.

        Raises:
            NoAnswer: it does not, or it has none of that name.
        """
        await self._exchange("POST", "unload_lora_adapter", {"lora_name": name})

    async def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Send a request and read all of a response that says 200."""
        where = f"{self.settings.url}/{path}"
        content = bytearray()
        try:
            async with (
                asyncio.timeout(self.settings.timeout),
                self._client.stream(method, path, json=body) as response,
            ):
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > _LARGEST:
                        raise NoAnswer(
                            f"{where} does not stop answering: {_LARGEST // 1024**2} MB and more",
                            again=False,
                            billed=True,
                        )
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            raise NoAnswer(
                f"{where} has not answered within {self.settings.timeout:g} s (factory.endpoint.timeout)",
                again=True,
                billed=True,
            ) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise NoAnswer(
                f"no server answers at {self.settings.url}: {self._words(str(error))}",
                again=True,
                billed=False,
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = self._words(str(error) or type(error).__name__)
            raise NoAnswer(f"{where} broke off: {reason}", again=True, billed=True) from None
        if response.status_code != httpx2.codes.OK:
            raise self._refused(where, response, bytes(content))
        return bytes(content)

    def _refused(self, where: str, response: httpx2.Response, content: bytes) -> NoAnswer:
        status = response.status_code
        message = f"{where} answers {status}: {self._words(error_message(content)) or response.reason_phrase}"
        again = status in (408, 409, 425, 429) or status >= 500
        wait = retry_after(response.headers.get("Retry-After"))
        if again and wait is not None:
            if wait > self.settings.patience:
                message += (
                    f"; it wants to be left alone for {wait:.0f} s, which is longer than factory.endpoint.patience "
                    f"({self.settings.patience:g} s)"
                )
                again = False
            else:
                self._pace.hold(wait)
        if status in (401, 403):
            key = self.settings.key_env
            message += (
                f"; it takes the key in the environment variable {key}"
                if key
                else ("; name the environment variable that holds the key under factory.endpoint.key_env")
            )
        return NoAnswer(message, again=again, billed=status in _BY_GATEWAYS, status=status)

    def _garbled(self, path: str, content: bytes) -> NoAnswer:
        message = f"{self.settings.url}/{path} answers what is no answer of OpenAI's protocol"
        if words := self._words(error_message(content)):
            message += f": {words}"
        return NoAnswer(message, again=True, billed=True, status=httpx2.codes.OK)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _words(self, text: str) -> str:
        """A server's own words on one line, harmless and without the key."""
        line = " ".join(self._without_key(text).split())
        return "".join(c if c.isprintable() else "?" for c in line)[:_REASON]


async def patiently(
    settings: Endpoint,
    send: Callable[[], Awaitable[T]],
    again: Callable[[NoAnswer], bool] = lambda error: True,
) -> T:
    """Send again what failed for a while, after waits that double and are drawn at random.

    Args:
        settings: how often, and after what wait.
        send: the request.
        again: asked after each failure that may pass; if false, it is the last.

    Raises:
        NoAnswer: that of the last time.
    """

    async def sent() -> T:
        return await send()

    retrying = AsyncRetrying(
        stop=stop_after_attempt(1 + settings.retries),
        wait=wait_random_exponential(multiplier=settings.backoff, max=settings.patience),
        retry=retry_if_exception(lambda error: isinstance(error, NoAnswer) and error.again and again(error)),
        reraise=True,
    )
    return await retrying(sent)


class _Pace:
    """Spaces requests out, and holds all of them back when the server says so."""

    def __init__(self, a_minute: float | None):
        self._gap = 0.0 if a_minute is None else 60 / a_minute
        self._free = 0.0

    async def turn(self) -> None:
        """Wait for this request's turn."""
        while (wait := self._free - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._free = time.monotonic() + self._gap

    def hold(self, seconds: float) -> None:
        """Let no request pass for a while."""
        self._free = max(self._free, time.monotonic() + seconds)


def _key(settings: Endpoint) -> str:
    """The key; empty for a server without one."""
    if settings.key_env is None:
        return ""
    key = os.environ.get(settings.key_env, "").strip()
    if not key:
        raise UserError(
            f"factory.endpoint.key_env: the environment variable {settings.key_env} is not set; "
            f"export {settings.key_env}=... before the command"
        )
    if not (key.isascii() and key.isprintable()):  # a header could not hold it, and the error would repeat it
        raise UserError(f"the key in {settings.key_env} holds characters that no key has; export it anew")
    return key
