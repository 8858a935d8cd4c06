"""The endpoint factory against a server on a real socket, well-behaved and not."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from endpoint_runs import searching_config
from scripted import PROGRAMS
from selfdev.algorithms.source import Form, read_program
from selfdev.errors import Halted, UserError
from selfdev.factory.endpoint import EndpointFactory
from selfdev.factory.journal import Answer, Usage
from selfdev.factory.protocol import Completion
from selfdev.factory.sampling import Sample
from selfdev.runs import run
from selfdev.streams import stream_seed
from unruly_server import TOKENS, UnrulyServer

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with UnrulyServer() as running:
        yield running


def factory_of(server: UnrulyServer, folder: Path, **changes: Any) -> EndpointFactory:
    return EndpointFactory(searching_config(server.url, **changes), folder)


def write(
    factory: EndpointFactory, iteration: int = 0, tick: Callable[..., None] = lambda *_: None
) -> list[Sample]:
    asked = enumerate(factory.prompts(iteration) * factory.config.programs)
    return factory.write(list(asked), iteration, 0.8, [], tick)


def seeds_of(factory: EndpointFactory) -> list[int]:
    """Of the requests of the first iteration."""
    config = factory.config
    return [stream_seed(config.seed, "sample", 0, number) % 2**31 for number in range(config.programs)]


def test_each_program_is_asked_for_with_a_seed_of_its_own(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path)
    ticks: list[tuple[int, int]] = []
    written = write(factory, tick=lambda done, total, note: ticks.append((done, total)))
    assert len(written) == 12
    assert ticks[-1] == (12, 12)
    assert len({body["seed"] for body in server.asked}) == 12
    [body] = {repr({k: v for k, v in body.items() if k != "seed"}) for body in server.asked}
    assert "'temperature': 0.8" in body
    assert "'max_tokens': 60" in body
    assert "'model': 'unruly'" in body
    assert server.asked[0]["prompt"].endswith("def merge_")
    # What is read of an answer ends with the function, which the server wrote on behind.
    by_seed = {body["seed"]: PROGRAMS[body["seed"] % len(PROGRAMS)] for body in server.asked}
    assert sorted(s.text.split("\n")[0] for s in written) == sorted(
        p.split("\n")[0] for p in by_seed.values()
    )
    assert all(sample.finished and "another" not in sample.text for sample in written)
    assert all(sample.tokens == () and sample.log_prob is None for sample in written)


def test_what_is_written_is_asked_for_once(server: UnrulyServer, tmp_path: Path) -> None:
    first = write(factory_of(server, tmp_path))
    assert write(factory_of(server, tmp_path)) == first
    assert len(server.asked) == 12
    assert all(sample.seconds is not None and 0 < sample.seconds < 60 for sample in first)
    again = write(factory_of(server, tmp_path))
    assert [sample.seconds for sample in again] == [sample.seconds for sample in first]
    assert write(factory_of(server, tmp_path), iteration=1) != first
    assert len(server.asked) == 24


def test_a_message_is_answered_with_a_code_block(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path, form="contract")
    written = write(factory)
    assert all("stop" not in body and body["messages"][0]["role"] == "user" for body in server.asked)
    sources = [read_program(sample.text, Form.CONTRACT) for sample in written]
    assert all("def merge_models(model_dict, device)" in source for source in sources)


def test_fields_of_the_users_own_go_with_every_request(server: UnrulyServer, tmp_path: Path) -> None:
    write(factory_of(server, tmp_path, request={"reasoning_effort": "low", "top_p": None}))
    assert all(body["reasoning_effort"] == "low" and "top_p" not in body for body in server.asked)
    assert all("top_k" not in body and "min_p" not in body for body in server.asked)


def test_the_cuts_of_the_sampling_are_those_of_the_config(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path)
    cut = factory.config.factory.model_copy(update={"top_k": 7, "min_p": 0.25, "top_p": 0.5})
    factory.config = factory.config.model_copy(update={"factory": cut})
    write(factory)
    assert {(body["top_k"], body["min_p"], body["top_p"]) for body in server.asked} == {(7, 0.25, 0.5)}


@pytest.mark.parametrize("misdeed", ["429", "500", "503", "cut", "garbage", "empty"])
def test_a_failure_that_passes_is_asked_again(misdeed: str, server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path)
    server.misdeeds = [misdeed] * 3
    assert len(write(factory)) == 12
    assert len(server.asked) == 12 + 3
    assert len(server.answered) == 12


def test_a_request_that_takes_too_long_is_given_up_and_sent_again(
    server: UnrulyServer, tmp_path: Path
) -> None:
    factory = factory_of(server, tmp_path, timeout=1.0, retries=50)
    server.misdeeds = ["slow"]
    assert len(write(factory)) == 12
    assert len(server.asked) >= 13


def test_all_requests_wait_as_long_as_the_server_asks(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path, concurrency=1)
    server.misdeeds, server.retry_after = ["429"], "0.3"
    assert len(write(factory)) == 12
    assert len(server.asked) == 13
    assert server.too_early == 0


@pytest.mark.parametrize(
    ("misdeed", "message"),
    [
        ("400", r"answers 400: \?\[31mno Bearer \[key\]"),
        ("401", "environment variable UNRULY_KEY"),
        ("500", "answers 500"),
        ("cut", "broke off"),
        ("garbage", "no answer of OpenAI's protocol: <html>It works!</html>"),
        ("provider", "no answer of OpenAI's protocol: the provider behind says: context too long"),
        ("endless", "does not stop answering"),
    ],
)
def test_a_failure_that_stays_ends_the_session_and_keeps_what_is_written(
    misdeed: str,
    message: str,
    server: UnrulyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNRULY_KEY", KEY)
    server.key = KEY
    factory = factory_of(server, tmp_path, key_env="UNRULY_KEY", concurrency=2, retries=1)
    server.misdeeds = ["", "", "", *[misdeed] * 20]
    with pytest.raises(Halted, match=message) as halted:
        write(factory)
    assert KEY not in str(halted.value)
    kept = len(server.answered)
    assert kept == 3
    server.misdeeds = []
    assert len(write(factory_of(server, tmp_path, key_env="UNRULY_KEY"))) == 12
    assert len(server.answered) == 12


def test_what_the_server_refuses_alone_counts_as_empty(
    server: UnrulyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Or every resume would meet it again: here the sixth of twelve, by its seed."""
    factory = factory_of(server, tmp_path, concurrency=2)
    seeds = seeds_of(factory)
    server.refused = {seeds[5]}
    written = write(factory)
    assert [number for number, sample in enumerate(written) if not sample.text] == [5]
    assert not written[5].finished
    assert [body["seed"] for body in server.asked].count(seeds[5]) == 2
    assert "a program counts as empty that the server refuses to write: " in caplog.text
    before = len(server.asked)
    assert write(factory_of(server, tmp_path)) == written  # and is not asked for again
    assert len(server.asked) == before
    assert spent(factory).tokens == 11 * TOKENS


def test_a_refusal_before_any_answer_counts_as_empty_too(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path, concurrency=1)
    server.refused = {seeds_of(factory)[0]}
    assert [number for number, sample in enumerate(write(factory)) if not sample.text] == [0]


def test_what_was_answered_before_a_repair_turn_counts_for_the_server(
    server: UnrulyServer, tmp_path: Path
) -> None:
    """An iteration is then asked for in two calls, and the prompts of the second may all be too long."""
    for _ in range(2):  # the second time it is a resumed run's
        factory = factory_of(server, tmp_path, concurrency=1)
        server.refused = set(seeds_of(factory)[9:])
        asked = list(enumerate(factory.prompts(0) * 12))
        halves = [factory.write(half, 0, 0.8, [], lambda *_: None) for half in (asked[:8], asked[8:])]
        assert [bool(sample.text) for half in halves for sample in half] == [True] * 9 + [False] * 3


def test_a_server_that_refuses_everything_ends_the_session(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path, concurrency=64)
    server.misdeeds = ["400"] * 99
    with pytest.raises(Halted, match="answers 400"):
        write(factory)
    assert spent(factory).tokens == 0


@pytest.mark.parametrize(("status", "billed"), [("502", True), ("524", True), ("500", False), ("503", False)])
def test_what_a_gateway_gave_up_stays_in_the_account(
    status: str, billed: bool, server: UnrulyServer, tmp_path: Path
) -> None:
    factory = factory_of(server, tmp_path, concurrency=1)
    server.misdeeds = [status]
    assert len(write(factory)) == 12
    assert (spent(factory).tokens > 12 * TOKENS) == billed


def test_a_refusal_that_passes_is_made_up_for(server: UnrulyServer, tmp_path: Path) -> None:
    server.misdeeds = ["", "", "", "400"]
    assert all(sample.text for sample in write(factory_of(server, tmp_path, concurrency=2)))


def test_a_server_that_begins_to_refuse_everything_ends_the_session(
    server: UnrulyServer, tmp_path: Path
) -> None:
    factory = factory_of(server, tmp_path, concurrency=1)
    seeds = seeds_of(factory)
    server.refused = set(seeds[4:])
    with pytest.raises(Halted, match="answers 400"):
        write(factory)
    assert 5 <= len(server.asked) <= 9
    server.refused = set()
    assert all(sample.text for sample in write(factory_of(server, tmp_path)))


@pytest.mark.parametrize(
    ("choice", "log_prob"),
    [
        ({"logprobs": {"token_logprobs": [-1.0, float("-inf")]}}, None),
        ({"logprobs": {"content": [{"logprob": -1.0}, {"logprob": None}]}}, None),
        ({"logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}}, (-1.0, -2.0)),
    ],
)
def test_log_probabilities_that_are_none_cost_no_answer(
    choice: dict[str, Any], log_prob: tuple[float, ...] | None
) -> None:
    said = {"choices": [{"text": "ab", "token_ids": [1, 2], "finish_reason": "stop", **choice}]}
    answer = Completion.model_validate_json(json.dumps(said)).answer()
    assert answer.log_probs == log_prob
    assert Answer.model_validate_json(answer.model_dump_json()) == answer  # as the journal keeps it


def test_what_the_server_gave_up_half_way_is_no_answer() -> None:
    said = {"choices": [{"text": "def half(", "finish_reason": "abort"}]}
    with pytest.raises(ValueError, match="given up"):
        Completion.model_validate(said).answer()


def test_a_wait_that_is_too_long_ends_the_session_at_once(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path, concurrency=1)
    server.misdeeds, server.retry_after = ["429"], "3600"
    with pytest.raises(Halted, match=r"3600 s, which is longer than factory\.endpoint\.patience"):
        write(factory)
    assert len(server.asked) == 1


def test_a_server_that_dies_in_the_middle_is_taken_up_again(server: UnrulyServer, tmp_path: Path) -> None:
    factory = factory_of(server, tmp_path, concurrency=2)

    def tick(done: int, total: int, note: str) -> None:
        if done == 5:
            server.die_after = 0

    with pytest.raises(Halted, match="broke off"):
        write(factory, tick=tick)
    before = len(server.answered)
    assert 5 <= before < 12
    server.stop()
    with pytest.raises(Halted, match=r"no server answers at http://127\.0\.0\.1"):
        write(factory_of(server, tmp_path))  # a resumed run begins without the server, and then needs it
    server.die_after = None
    server.start()
    assert len(write(factory_of(server, tmp_path))) == 12
    assert len(server.answered) == 12


def test_no_server_at_the_start_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as silent:  # it keeps the port, and listens to nobody
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(
            UserError, match=f"no server answers at {url}.*\nStart the server, or set factory.endpoint.url"
        ):
            EndpointFactory(searching_config(url), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_server_does_not_know_is_refused(server: UnrulyServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no word from 'tame'.*does not exist.*it lists unruly"):
        factory_of(server, tmp_path, model="tame", request={"max_tokens": None, "max_completion_tokens": 200})
    [probe] = server.probes
    assert (probe["max_completion_tokens"], "max_tokens" in probe) == (1, False)


def test_a_server_of_another_dialect_is_refused_before_the_run_begins(
    server: UnrulyServer, tmp_path: Path
) -> None:
    server.unknown_fields = {"max_tokens"}
    folder = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"does not do what it is asked: .* 400: .*\n.*factory.endpoint.request"
    ):
        run(searching_config(server.url), folder)
    assert not folder.exists()
    # In its dialect it writes.
    own = {"max_tokens": None, "max_completion_tokens": 200}
    assert len(write(factory_of(server, tmp_path, request=own))) == 12
    server.unknown_fields, server.wants_room = set(), True
    folder.mkdir()
    assert len(write(factory_of(server, folder))) == 12
    server.only_messages, server.wants_room = True, False
    with pytest.raises(
        UserError, match=r"(?s)404: .*set factory.endpoint.chat: true or prompt.form: contract"
    ):
        factory_of(server, tmp_path / "other", request=own)


def test_an_address_that_is_no_server_of_the_protocol_is_refused(
    server: UnrulyServer, tmp_path: Path
) -> None:
    config = searching_config(server.url.removesuffix("/v1") + "/wrong", retries=0)
    with pytest.raises(UserError, match=r"factory\.endpoint\.url: .* answers 404.* up to and with /v1"):
        EndpointFactory(config, tmp_path)


@pytest.mark.parametrize("misdeed", ["garbage", "provider", "empty"])
def test_a_server_that_answers_something_else_is_refused_before_the_run_begins(
    misdeed: str, server: UnrulyServer, tmp_path: Path
) -> None:
    server.trials = misdeed
    with pytest.raises(UserError, match=r"does not do what it is asked: .* no answer of OpenAI's protocol"):
        run(searching_config(server.url), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    server.trials = "429"  # that it is busy is no reason
    server.retry_after = "0"
    factory_of(server, tmp_path)


def test_a_key_that_is_not_there_or_not_accepted_is_refused(
    server: UnrulyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="variable UNRULY_KEY is not set"):
        factory_of(server, tmp_path, key_env="UNRULY_KEY")
    server.key = KEY
    with pytest.raises(UserError, match="name the environment variable that holds the key"):
        factory_of(server, tmp_path)
    monkeypatch.setenv("UNRULY_KEY", wrong := "sk-wrong-0123456789")
    with pytest.raises(UserError, match=r"no such key: \[key\]; it takes the key") as refused:
        factory_of(server, tmp_path, key_env="UNRULY_KEY")
    assert wrong not in str(refused.value)


# --- budgets


def spent(factory: EndpointFactory) -> Usage:
    return factory.journal.spent()


def test_a_token_budget_is_never_exceeded_and_all_it_pays_for_is_written(
    server: UnrulyServer, tmp_path: Path
) -> None:
    # Each takes 30 tokens in and 10 out; before its answer it may take the bytes of its prompt and 60.
    factory = factory_of(server, tmp_path, tokens_budget=4000, concurrency=8, programs=110)
    at_most = len(factory.prompts(0)[0].text.encode()) + 60
    assert 500 < at_most < 1000
    with pytest.raises(
        Halted,
        match=r"budget of 4,000 tokens does not pay for one more program: .*--set factory.endpoint.tokens_budget",
    ):
        write(factory)
    assert spent(factory).tokens == len(server.answered) * TOKENS
    # Once one is answered, the length of the prompt is known, and 90 are what one more may take.
    assert 4000 - 90 < spent(factory).tokens <= 4000
    write(factory_of(server, tmp_path, tokens_budget=6000, programs=110))
    assert len(server.answered) == 110


@pytest.mark.parametrize(
    ("request_", "most"),
    [
        ({"max_tokens": None, "max_completion_tokens": 200}, 200),
        ({"max_tokens": 90}, 90),
        ({"n": 3}, 180),
    ],
)
def test_what_is_reserved_is_what_the_request_allows(
    request_: dict[str, Any], most: int, server: UnrulyServer, tmp_path: Path
) -> None:
    factory = factory_of(server, tmp_path, request=request_, retries=0)
    server.misdeeds = ["cut"] * 100  # an answer that never came counts at its most
    with pytest.raises(Halted):
        write(factory)
    assert spent(factory).tokens_out % most == 0
    assert spent(factory).tokens_out > 0


def test_money_is_counted_by_the_prices(server: UnrulyServer, tmp_path: Path) -> None:
    # 30 tokens in at 1 and 10 out at 3: 60 millionths each.
    factory = factory_of(
        server, tmp_path, money_budget=2000e-6, price_in=1.0, price_out=3.0, programs=100, concurrency=8
    )
    with pytest.raises(
        Halted, match=r"budget of 0.002 does not pay for one more program: .*factory.endpoint.money_budget"
    ):
        write(factory)
    tokens = spent(factory)
    money = (tokens.tokens_in * 1.0 + tokens.tokens_out * 3.0) / 1e6
    # Nothing was in flight when it ended, so another one that is counted in full would not have fitted.
    assert 2000e-6 - (30 + 60 * 3.0) / 1e6 < money <= 2000e-6
    assert len(server.answered) * 60e-6 == pytest.approx(money)


def test_an_answer_that_never_came_counts_at_its_most_and_a_refusal_does_not(
    server: UnrulyServer, tmp_path: Path
) -> None:
    factory = factory_of(server, tmp_path, programs=1, concurrency=1)
    server.misdeeds = ["500", "429", "cut"]
    prompt = factory.prompts(0)[0].text
    write(factory)
    assert spent(factory) == Usage(len(prompt.encode()) + 30, 60 + 10)


def test_a_server_that_does_not_count_is_taken_at_the_most(server: UnrulyServer, tmp_path: Path) -> None:
    server.counts = False
    factory = factory_of(server, tmp_path, programs=2)
    write(factory)
    assert spent(factory) == Usage(2 * len(factory.prompts(0)[0].text.encode()), 2 * 60)


def test_a_pace_is_kept(server: UnrulyServer, tmp_path: Path) -> None:
    """Three gaps of half a second, of which half are for a first request that was slow to arrive."""
    factory = factory_of(server, tmp_path, requests_a_minute=120.0, programs=4)
    assert len(write(factory)) == 4
    assert len(server.arrived) == 4
    assert server.arrived[-1] - server.arrived[0] >= 0.5 * 3 * 60 / 120


def test_it_works_where_a_loop_is_running_already(server: UnrulyServer, tmp_path: Path) -> None:
    async def notebook() -> int:
        return len(write(factory_of(server, tmp_path)))

    assert asyncio.run(notebook()) == 12


def test_control_c_keeps_what_has_come_in(server: UnrulyServer, tmp_path: Path) -> None:
    def impatient(done: int, total: int, note: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    factory = factory_of(server, tmp_path, concurrency=2)
    with pytest.raises(KeyboardInterrupt):
        write(factory, tick=impatient)
    assert len(write(factory)) == 12
    assert len({body["seed"] for body in server.answered}) == 12
    assert len(server.answered) <= 12 + 2
