"""The account of what a server was asked: it is on the disk, and a budget holds whatever is in flight."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfdev.factory.budget import Budget, Exhausted
from selfdev.factory.journal import Answer, Journal, Usage
from selfdev.settings import Endpoint

URL = "http://127.0.0.1:1/v1"


def test_an_answer_outlives_the_process_and_settles_its_request(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "written.db")
    number = journal.ask("question", Usage(100, 50))
    assert journal.spent() == Usage(100, 50)
    assert journal.answers(["question"]) == {}
    answer = Answer(
        text="a(deltas)", finished=True, tokens=(1, 2), log_probs=(-0.5, -1.5), tokens_in=90, tokens_out=2
    )
    journal.settle(number, answer)
    tag = journal.tag
    journal.close()
    again = Journal(tmp_path / "written.db")
    assert again.answers(["question", "another"]) == {"question": answer}
    assert again.spent() == Usage(90, 2)
    assert again.tag == tag
    assert Journal(tmp_path / "other.db").tag != tag


def test_a_request_that_was_open_when_the_process_died_counts_at_its_most(tmp_path: Path) -> None:
    Journal(tmp_path / "written.db").ask("question", Usage(100, 50))
    assert Journal(tmp_path / "written.db").spent() == Usage(100, 50)


def test_a_struck_request_costs_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "written.db")
    journal.forget(journal.ask("question", Usage(100, 50)))
    assert journal.spent() == Usage(0, 0)


def test_a_request_waits_for_those_in_flight_before_it_gives_up(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "written.db")

    async def scenario() -> list[str]:
        budget, told = Budget(Endpoint(url=URL, tokens_budget=200), journal), []
        first = await budget.reserve("first", Usage(100, 60))

        async def second() -> None:
            number = await budget.reserve("second", Usage(100, 60))
            told.append("second")
            await budget.release(number)

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        told.append("first settles")
        await budget.settle(first, Answer(text="", finished=True, tokens_in=30, tokens_out=10))
        await waiting
        with pytest.raises(Exhausted, match="40 are spent, and it may take 161"):
            await budget.reserve("third", Usage(100, 61))
        return told

    assert asyncio.run(scenario()) == ["first settles", "second"]


ENDS = st.sampled_from(["settle", "release", "lose"])
REQUESTS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60), st.floats(0, 1), ENDS), max_size=25)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=REQUESTS, limit=st.integers(1, 400), workers=st.integers(1, 6))
def test_no_order_of_ends_exceeds_a_budget(
    requests: list[tuple[int, int, float, str]],
    limit: int,
    workers: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal") / "written.db")

    async def run() -> None:
        budget, waiting = Budget(Endpoint(url=URL, tokens_budget=limit), journal), iter(enumerate(requests))

        async def work() -> None:
            for name, (tokens_in, tokens_out, share, end) in waiting:
                try:
                    number = await budget.reserve(str(name), Usage(tokens_in, tokens_out))
                except Exhausted:
                    return
                assert journal.spent().tokens <= limit
                await asyncio.sleep(0)
                if end == "settle":
                    real = {"tokens_in": tokens_in, "tokens_out": int(share * tokens_out)}
                    await budget.settle(number, Answer(text="", finished=True, **real))
                else:
                    await (budget.release if end == "release" else budget.lose)(number)
                assert journal.spent().tokens <= limit

        await asyncio.gather(*(work() for _ in range(workers)))

    asyncio.run(run())
    journal.close()
