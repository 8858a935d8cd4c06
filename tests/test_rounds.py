"""What a round is given of the archive, and rounds that come to nothing: the run goes on with the factory it had."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripted import PROGRAMS, ScriptedFactory, scripted_config
from selfdev.archive import Pair
from selfdev.cli import main
from selfdev.factory.prompt import Prompt
from selfdev.factory.sampling import Sample
from selfdev.factory.taught import Taught
from selfdev.preferences import asked
from selfdev.results import Run
from selfdev.runs import run


class Unlucky(ScriptedFactory):
    """Its rounds end without an adapter."""

    def __init__(self, facts: dict[str, Any]):
        super().__init__(PROGRAMS[:8])
        self.outcome = facts
        self.flip_rates: list[float] = []

    def refine(self, taught: Taught, *_: Any) -> dict[str, Any]:
        self.flip_rates.append(taught.flip_rate)
        return self.outcome


@pytest.mark.parametrize(
    "facts", [{"pairs": 4, "rolled_back": "the loss ..."}, {"skipped": "2 pairs, fewer than ..."}]
)
def test_without_an_adapter_the_factory_stays_what_it_was_and_the_page_says_so(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = Unlucky(facts)
    config = scripted_config(programs=8, iterations=2, rivals=["task_arithmetic"])
    ended = run(config, tmp_path / "run", factory=factory)
    [round_] = ended.archive.refinements("learning")
    assert round_.adapter is None
    assert round_.facts == facts
    assert ended.archive.run.status == "done"
    [first] = [i for i in ended.summary()["iterations"] if (i["arm"], i["iteration"]) == ("learning", 1)]
    [why] = {facts.get("skipped"), facts.get("rolled_back")} - {None}
    assert first["nothing_learned"] == why
    assert main(["show", str(ended.folder)]) == 0
    assert f"After iteration 1 the arm 'learning' learned nothing: {why}" in capsys.readouterr().out
    texts = {arm: [c.text for c in ended.archive.candidates(arm, 1)] for arm in ("learning", "frozen")}
    assert texts["learning"] == texts["frozen"]
    # Pairs of one round: some were rejected for their score, and no two scores are sure.
    assert 0 < factory.flip_rates[0] < 0.5


class UnluckyOnce(ScriptedFactory):
    """Its second round ends without an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.wrote_with: list[list[str]] = []

    def write(self, asked: Any, iteration: int, temperature: float, adapters: Any, tick: Any) -> list[Sample]:
        self.wrote_with.append([adapter.name for adapter in adapters])
        return super().write(asked, iteration, temperature, adapters, tick)

    def refine(self, taught: Taught, iteration: int, *rest: Any) -> dict[str, Any]:
        if iteration == 1:
            return {"pairs": len(taught.pairs), "rolled_back": "the loss ..."}
        return super().refine(taught, iteration, *rest)


@pytest.mark.parametrize("refit", [pytest.param("continue", marks=pytest.mark.proof), "fresh"])
def test_after_a_round_that_diverged_the_last_adapter_goes_on_writing(refit: str, tmp_path: Path) -> None:
    factory = UnluckyOnce()
    config = scripted_config(
        iterations=4, controls=[], rivals=["task_arithmetic"], refinement={"refit": refit}
    )
    run(config, tmp_path / "run", factory=factory)
    last = {"continue": ["learning-1", "learning-3"], "fresh": ["learning-3"]}[refit]
    assert factory.wrote_with == [[], ["learning-1"], ["learning-1"], last]


class Recording(ScriptedFactory):
    """Asks anew in every iteration, writes no two texts in the same tokens, and keeps what it is to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[tuple[int, list[Any], list[str], list[Any]]] = []

    def prompts(self, iteration: int) -> list[Prompt]:
        return [Prompt(f"prompt {iteration} {i}", (), form="short") for i in range(2)]  # type: ignore[arg-type]

    def write(self, asked: Sequence[tuple[int, Prompt]], iteration: int, *rest: Any) -> list[Sample]:
        written = super().write(asked, iteration, *rest)
        return [replace(s, tokens=(100 + iteration, *s.tokens)) for s in written]

    def refine(self, taught: Taught, iteration: int, adapters: Any, *rest: Any) -> dict[str, Any]:
        names = [adapter.name for adapter in adapters]
        self.rounds.append((iteration, list(taught.pairs), names, list(taught.imitated)))
        return super().refine(taught, iteration, adapters, *rest)


@pytest.mark.parametrize(
    ("refit", "passes"), [pytest.param("continue", 0, marks=pytest.mark.proof), ("fresh", 1)]
)
def test_a_round_is_given_the_archives_tokens_under_the_prompts_they_were_sampled_from(
    refit: str, passes: int, tmp_path: Path
) -> None:
    factory = Recording()
    config = scripted_config(
        iterations=3,
        controls=[],
        rivals=[],
        scaling={},
        refinement={"refit": refit, "imitation": {"passes": passes}},
    )
    archive = run(config, tmp_path / "run", factory=factory).archive
    programs = {c.name: c for c in archive.candidates()}
    texts = {each.iteration: each.prompts for each in archive.iterations("learning")}

    def prompt(name: str) -> str:
        return texts[programs[name].iteration][programs[name].prompt]

    def lesson(pair: Pair) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        return prompt(asked(pair)), programs[pair.chosen].tokens, programs[pair.rejected].tokens

    assert [iteration for iteration, *_ in factory.rounds] == [0, 1]
    reasons = set()
    for t, pairs, adapters, imitated in factory.rounds:
        rounds = range(t + 1) if refit == "fresh" else [t]
        expected = [pair for round_ in rounds for pair in archive.pairs("learning", round_)]
        reasons |= {pair.reason for pair in expected}
        assert [(p.text, chosen, rejected) for p, chosen, rejected in pairs] == list(map(lesson, expected))
        good = [
            c
            for c in programs.values()
            if c.iteration in rounds and (c.arm == "repaired" or (c.arm, c.status) == ("learning", "new"))
        ]
        assert {(p.text, tokens) for p, tokens in imitated} == {(prompt(c.name), c.tokens) for c in good}
        assert adapters == ["learning-1"][:t]
    assert reasons == {"score", "copy", "failure"} | ({"repair"} if passes == 0 else set())
    # Chosen are elites of the first iteration as well, under the prompt of then.
    assert any(p.text.startswith("prompt 0") for p, *_ in factory.rounds[1][1])


def ended(folder: Path, factory: ScriptedFactory, **changes: Any) -> Run:
    """Two iterations of six programs, without rivals."""
    config = scripted_config(programs=6, rivals=[], controls=[], **changes)
    return run(config, folder, factory=factory)


def statuses(found: Run, iteration: int) -> list[str | None]:
    return [c.failure or c.status for c in found.archive.candidates("learning", iteration)]


def test_a_factory_that_always_writes_the_same_text_ends_with_the_one_program_it_has(tmp_path: Path) -> None:
    found = ended(tmp_path / "run", ScriptedFactory(PROGRAMS[:1] * 6))
    assert statuses(found, 0) == ["new", *["repeated"] * 5]
    assert statuses(found, 1) == ["repeated"] * 6
    [round_] = found.archive.refinements("learning")
    assert round_.adapter is None  # a program is not preferred to its own copies
    assert "nothing to reject beside repetitions" in str(round_.why_nothing)
    assert found.archive.run.status == "done"
    assert found.best is not None
    assert found.best.name == found.verdict["best"] == "learning/1/001"


def test_a_round_with_nothing_but_failures_to_reject_says_so(tmp_path: Path) -> None:
    failing = [f"a(deltas):\n    return deltas.nope{number}()\n" for number in range(5)]
    factory = ScriptedFactory([PROGRAMS[0], *failing])
    found = ended(tmp_path / "run", factory, preferences={"failures_as_rejected": True})
    [round_] = found.archive.refinements("learning")
    assert "beyond preferences.failing_cap, failures" in str(round_.why_nothing)


def test_answers_without_text_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = ended(tmp_path / "run", ScriptedFactory([""] * 6))
    assert {c.failure for c in found.archive.candidates("learning")} == {"NoFunction"}
    assert "most of these answers are empty" in caplog.text


class Endless(ScriptedFactory):
    """Never comes to an end: the limit on new tokens cuts every text."""

    def write(self, *arguments: Any) -> list[Sample]:
        return [replace(s, finished=False) for s in super().write(*arguments)]


def test_a_factory_that_always_runs_to_the_limit_ends_with_an_honest_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "    s = s + deltas[0]\n"
    begun = "a(deltas):\n    s = deltas[0]\n" + line * 20
    texts = [begun, begun + "    s = s +", "again and again " * 20]
    found = ended(tmp_path / "run", Endless(texts * 2))
    for iteration in range(2):
        whole, cut, prose = statuses(found, iteration)[:3]
        assert statuses(found, iteration)[3:] == [whole, cut, prose]
        assert (cut, prose) == ("SyntaxError", "NoFunction")
        assert whole not in ("new", "trivial", "known", "repeated")  # it returns nothing
    assert not any(c.finished for c in found.archive.candidates("learning"))
    assert "most of these programs were cut off at factory.max_new_tokens" in caplog.text
    assert main(["show", str(found.folder)]) == 0
    assert "were cut off at factory.max_new_tokens" in " ".join(capsys.readouterr().out.split())
    assert found.archive.run.status == "done"
    assert found.best is None
    assert "no new program" in found.verdict["headline"]
