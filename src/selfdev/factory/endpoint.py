"""The factory over an endpoint: a server samples, and what is learned is learned here.

What a server wrote is a fact: each answer is in the run's journal before the next step, and a resumed run asks only
for what is missing there. Requests carry seeds, which a server may or may not honour; nothing relies on it.

Where the weights are here too (`LocalFactory`) and the server is vLLM, every round's adapter is loaded into it. Where
they are not, nothing can be learned, and the run is a search.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import Form
from selfdev.config import Config
from selfdev.errors import Halted, SelfdevError, UserError
from selfdev.factory.budget import Budget
from selfdev.factory.factory import LocalFactory
from selfdev.factory.journal import JOURNAL, Answer, Journal, Usage
from selfdev.factory.prompt import STOP, Prompt, prompts_of
from selfdev.factory.sampling import Sample
from selfdev.factory.served_adapters import ServedAdapters, check_runtime_adapters
from selfdev.factory.server import NoAnswer, Server, patiently
from selfdev.factory.taught import Taught
from selfdev.factory.training import Tick
from selfdev.factory.transcript import END_STRINGS, to_sample
from selfdev.settings import ENDPOINT_MODEL, LIMITS
from selfdev.streams import stream_seed

log = logging.getLogger(__name__)

T = TypeVar("T")

_TEMPLATE = 64
"""Tokens that a chat template puts around a message, at most."""


@dataclass(frozen=True)
class _Question:
    """One program that is asked for.

    Attributes:
        text: of its prompt.
        body: the request.
        key: hash of all that decides the answer.
        most: what it may cost at most, as far as is known before the first answer.
    """

    text: str
    body: dict[str, Any]
    key: str
    most: Usage


class EndpointFactory:
    """Writes programs through a server, and learns where the weights are here.

    Args:
        config: of the run; `factory.endpoint` is set.
        folder: of the run, in which the journal lies.

    Raises:
        UserError: no server answers, or it does not do what the run needs of it; no program has been asked for.
    """

    def __init__(self, config: Config, folder: Path):
        if config.factory.endpoint is None:
            raise ValueError("factory.endpoint is not set")
        self.config = config
        self.settings = config.factory.endpoint
        self.model = self.settings.model or config.factory.model.removeprefix(ENDPOINT_MODEL)
        form = config.prompt.form
        self.chat = form is Form.CONTRACT if self.settings.chat is None else self.settings.chat
        new = not (folder / JOURNAL).exists()  # a resumed run may need the server no more
        if new:
            _in_a_loop(self._check_server())
        self.learner = LocalFactory(config) if config.factory.weights_here else None
        if new and self.settings.adapters == "vllm":
            _in_a_loop(self._check_learning())
        self.journal = Journal(folder / JOURNAL)
        self._answered = 0
        self.adapters = ServedAdapters(self.settings, folder, self.journal.tag)

    @property
    def facts(self) -> dict[str, Any]:
        """What the archive keeps of it, once it is prepared."""
        local = {"model": self.config.factory.model} if self.learner is None else self.learner.facts
        return {**local, "served": self.model}

    def prepare(self, tick: Tick) -> None:
        """Make the warm start's adapter, here, if there is to be one."""
        if self.learner is not None:
            self.learner.prepare(tick)

    def prompts(self, iteration: int) -> list[Prompt]:
        """The prompts of one iteration."""
        config = self.config
        return prompts_of(config.prompt, examples(), config.seed, iteration, config.budget(iteration))

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a completion that nobody sampled; none where the weights are not here."""
        return () if self.learner is None else self.learner.tokens(text)

    def refine(
        self, taught: Taught, iteration: int, adapters: Sequence[Path], out: Path, tick: Tick
    ) -> dict[str, Any]:
        """Train an adapter here; see `LocalFactory.refine`. The server gets it when it is to write with it."""
        if self.learner is None:
            raise SelfdevError(f"{self.model} cannot learn: its weights are not here")
        return self.learner.refine(taught, iteration, adapters, out, tick)

    def write(
        self,
        asked: Sequence[tuple[int, Prompt]],
        iteration: int,
        temperature: float,
        adapters: Sequence[Path],
        tick: Tick,
    ) -> list[Sample]:
        """Have programs written; see `LocalFactory.write`.

        Raises:
            Halted: the server answers no more, or a budget is used up; what is written is in the journal.
        """
        layers = self._layers(adapters)
        model = self.adapters.name(layers) if layers else self.model
        questions = [
            self._question(model, prompt, iteration, number, temperature) for number, prompt in asked
        ]
        answers = self.journal.answers(question.key for question in questions)
        missing = [question for question in questions if question.key not in answers]
        if asked and asked[0][0] == 0:  # a repair turn asks once more in the same iteration of the same arm
            self._answered = 0
        if missing:
            known = len(questions) - len(missing)
            before = self._answered + _written(answers)
            answers |= _in_a_loop(
                self._ask(
                    missing, before, layers, lambda done, note: tick(known + done, len(questions), note)
                )
            )
        self._answered += _written(answers)
        tokenizer = None if self.learner is None else self.learner.tokenizer
        stop = None if self.chat else STOP[self.config.prompt.form]
        limit = self.config.factory.max_new_tokens
        return [to_sample(answers[question.key], tokenizer, stop, limit) for question in questions]

    def _layers(self, adapters: Sequence[Path]) -> list[Path]:
        """The adapters that the server is to sample with; none where it takes none."""
        return self.learner.layers(adapters) if self.learner and self.settings.adapters == "vllm" else []

    def _question(
        self, model: str, prompt: Prompt, iteration: int, number: int, temperature: float
    ) -> _Question:
        seed = stream_seed(self.config.seed, "sample", iteration, number)
        body = self._body(model, prompt.text, self.config.factory.max_new_tokens, temperature, seed)
        content = json.dumps([self.chat, iteration, number, body], sort_keys=True)
        # No tokenizer makes more tokens of a text than it has bytes.
        length = len(prompt.text.encode()) + _TEMPLATE * self.chat
        if self.learner is not None:
            length = len(prompt.tokens(self.learner.tokenizer))
        # `request` may name other limits than ours, and several answers.
        limits = [body.get(field) for field in LIMITS]
        longest = max((int(limit) for limit in limits if limit), default=self.config.factory.max_new_tokens)
        most = Usage(length, longest * int(body.get("n", 1)))
        return _Question(prompt.text, body, hashlib.sha256(content.encode()).hexdigest(), most)

    def _body(
        self, model: str, text: str, max_tokens: int, temperature: float = 1.0, seed: int = 0
    ) -> dict[str, Any]:
        """A request, as OpenAI's protocol has it, and vLLM's additions to it."""
        settings, vllm = self.config.factory, self.settings.adapters == "vllm"
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": settings.top_p,
            # OpenAI's own servers do not know these; vLLM takes those left out from the model's generation config.
            "top_k": settings.top_k or (-1 if vllm else None),
            "min_p": settings.min_p or (0.0 if vllm else None),
            "repetition_penalty": 1.0 if vllm else None,
            "seed": seed % 2**31,  # some servers keep it in 32 bits
        }
        if self.chat:
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if self.config.prompt.form is Form.SHORT:
            body["stop"] = list(END_STRINGS)
        if vllm:
            body |= {"return_token_ids": True, "include_stop_str_in_output": True}
            body["logprobs"] = True if self.chat else 0
        body |= self.settings.request
        return {field: value for field, value in body.items() if value is not None}

    async def _word(self, server: Server, text: str, *, once: bool = False) -> Answer:
        """Have the server write one token, whatever `factory.endpoint.request` allows; asked `once`, or patiently."""
        body = self._body(self.model, text, 1)
        body |= {field: 1 for field in ("max_tokens", "max_completion_tokens") if field in body}
        if once:
            return await server.complete(self.chat, body)
        return await patiently(self.settings, lambda: server.complete(self.chat, body))

    async def _ask(
        self,
        questions: list[_Question],
        known: int,
        layers: list[Path],
        tick: Callable[[int, str], None],
    ) -> dict[str, Answer]:
        """Ask for programs, some at once. After a failure those in flight come home, and no more are sent.

        What the server refuses while it answers as many others (its prompt is too long, or not to its taste) is asked
        once more behind them, and then counts as answered by nothing: a resumed run would meet the same refusal for
        ever. Before as many others can have been answered, those in flight may be refused. `known` is how many of the
        arm's iteration were answered before.
        """
        known = known or int(self.journal.has_answers)
        answers: dict[str, Answer] = {}
        failures: list[SelfdevError] = []
        refused: list[tuple[_Question, NoAnswer]] = []
        waiting = iter(questions)
        budget = Budget(self.settings, self.journal)
        lengths: dict[str, int] = {}

        def told(note: str) -> None:
            tick(len(answers), note)

        def again(error: NoAnswer) -> bool:
            told(f"again: {error}")
            return not failures

        async def send(question: _Question) -> None:
            tokens_in = lengths.get(question.text, question.most.tokens_in)
            number = await budget.reserve(question.key, Usage(tokens_in, question.most.tokens_out))
            if failures:  # while it waited for its turn
                await budget.release(number)
                return
            try:
                answer = await server.complete(self.chat, question.body)
            except NoAnswer as error:
                await (budget.lose if error.billed else budget.release)(number)
                raise
            await budget.settle(number, answer)
            if answer.tokens_in is not None:
                lengths[question.text] = answer.tokens_in
            answers[question.key] = answer
            told(budget.note())

        async def work() -> None:
            for question in waiting:
                if failures:
                    return
                try:
                    await patiently(self.settings, partial(send, question), again)
                except SelfdevError as error:
                    patience = max(self.settings.concurrency, known + len(answers))
                    if isinstance(error, NoAnswer) and error.refuses and len(refused) < patience:
                        told(f"refused: {error}")
                        refused.append((question, error))
                    else:
                        failures.append(error)

        told(budget.note())
        async with Server(self.settings) as server:
            try:
                if layers:
                    load = partial(self.adapters.load, server, layers, [self._layers([])])
                    await patiently(self.settings, load, again)
                await asyncio.gather(*(work() for _ in range(self.settings.concurrency)))
                if refused and not failures:
                    waiting, refused = iter([question for question, _ in refused]), []
                    await asyncio.gather(*(work() for _ in range(self.settings.concurrency)))
            except SelfdevError as error:
                failures.append(error)
        if len(refused) > known + len(answers):
            failures.append(refused[0][1])
        if not failures:
            for question, why in refused:
                log.warning("a program counts as empty that the server refuses to write: %s", why)
                answers[question.key] = Answer(text="", finished=False, tokens_in=0, tokens_out=0)
                self.journal.settle(self.journal.ask(question.key, Usage(0, 0)), answers[question.key])
        if failures:
            raise Halted(str(failures[0])) from failures[0]
        return answers

    # --- before anything is asked for

    async def _check_server(self) -> None:
        """Make sure that the server is there, serves the model, and understands what it is asked."""
        names: list[str] = []
        unlisted: int | None = None
        async with Server(self.settings) as server:
            try:
                names = await server.models()
            except NoAnswer as error:
                unlisted = error.status
                if unlisted is None:
                    raise UserError(
                        f"{error}\nStart the server, or set factory.endpoint.url to where it is"
                    ) from error
                if unlisted in (401, 403):
                    raise UserError(str(error)) from error
            try:
                await self._first_word(server, once=self.model in names)
            except NoAnswer as error:
                if self.model in names and error.again and error.status != httpx2.codes.OK:
                    return  # it is busy, and is asked again by the run
                raise UserError(self._why_silent(error, names, unlisted)) from error

    async def _first_word(self, server: Server, *, once: bool) -> None:
        """Have one token written, or as many as a program: a model that thinks aloud may say that one is too few.

        Raises:
            NoAnswer: it is not written.
        """
        try:
            await self._word(server, "def", once=once)
        except NoAnswer as error:
            if error.status != httpx2.codes.BAD_REQUEST:
                raise
            await server.complete(
                self.chat, self._body(self.model, "def", self.config.factory.max_new_tokens)
            )

    def _why_silent(self, error: NoAnswer, names: Sequence[str], unlisted: int | None) -> str:
        """What is wrong where a server does not write, and the way out.

        Args:
            error: of the request.
            names: models that it lists.
            unlisted: the status with which it refused to list any; None if it did not.
        """
        not_found = error.status == httpx2.codes.NOT_FOUND
        if self.model not in names:
            if not_found and unlisted == httpx2.codes.NOT_FOUND:
                return (
                    f"factory.endpoint.url: {error}, and {self.settings.url}/models too; the address is that up to and "
                    "with /v1, as in http://localhost:8000/v1"
                )
            listed = f"; it lists {', '.join(names[:20])}" if names else ""
            return f"factory.endpoint.model: no word from '{self.model}': {error}{listed}"
        way = ""
        if error.status in (httpx2.codes.BAD_REQUEST, httpx2.codes.UNPROCESSABLE_ENTITY):
            way = "\nAdd what it wants under factory.endpoint.request, or leave a field out there by null"
        elif not_found and not self.chat:
            way = "\nIf it takes messages alone, set factory.endpoint.chat: true or prompt.form: contract"
        return f"factory.endpoint: the server does not do what it is asked: {error}{way}"

    async def _check_learning(self) -> None:
        """Make sure that what is asked is what is trained on, and that adapters can be loaded."""
        if self.learner is None:
            raise ValueError("nothing learns")
        prompt = self.prompts(0)[0]
        tokens = len(prompt.tokens(self.learner.tokenizer))
        async with Server(self.settings) as server:
            try:
                answer = await self._word(server, prompt.text)
                await check_runtime_adapters(server)
            except NoAnswer as error:
                raise UserError(f"factory.endpoint: {error}") from error
        if answer.tokens_in != tokens:
            raise UserError(
                f"factory.endpoint.model: '{self.model}' reads the prompt as {answer.tokens_in} tokens, and the "
                f"tokenizer of {self.config.factory.model}, which learns from what is written, as {tokens}; they must "
                "be one model, asked in one way (factory.endpoint.chat, and the chat template)"
            )


def _in_a_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a notebook too, whose own loop is running already."""

    async def quietly() -> T:
        asyncio.get_running_loop().set_exception_handler(_unless_stopped)
        return await coroutine

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(quietly())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, quietly()).result()


def _unless_stopped(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell of an error that nobody has waited for; that Ctrl-C has ended a request is none."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def _written(answers: Mapping[str, Answer]) -> int:
    """How many answers there are beside those that stand for a refusal."""
    return sum(bool(answer.text) or answer.tokens_out != 0 for answer in answers.values())
