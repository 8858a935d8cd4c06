"""The repair turn: what fails of the first half is shown to the factory once, with its error."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripted import PROGRAMS, ScriptedFactory, Stopper, scripted_config
from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import Form
from selfdev.cli import main
from selfdev.config import Config, load_config
from selfdev.errors import Interrupted, UserError
from selfdev.factory.prompt import Prompt, ask
from selfdev.factory.sampling import Sample
from selfdev.factory.taught import Taught
from selfdev.report.dataset import export_pairs
from selfdev.results import Run
from selfdev.runs import resume, run

NEW, KNOWN = PROGRAMS[2], PROGRAMS[5]
PAIR = "median(deltas):\n    return deltas.median(dim=0)\n"
SYNTAX = "deep(deltas):\n    return (\n"
SHAPE = "shape(deltas):\n    return deltas.sum()\n"
CORRECTED = {PAIR: KNOWN, SYNTAX: SHAPE, SHAPE: NEW}
USUAL = [
    *(PROGRAMS[0], PAIR, "this is no function", SYNTAX, PROGRAMS[4], SHAPE),
    *("written in turns", "written in turns", "written in turns", SHAPE, PROGRAMS[1], PROGRAMS[7]),
]
"""Numbers 6, 7 and 8 correct 1, 3 and 5; what fails after the turn has none."""


class Correcting(ScriptedFactory):
    """Corrects what it is shown, and remembers what it was asked and taught."""

    def __init__(self) -> None:
        super().__init__(USUAL)
        self.asked: list[list[int]] = []
        self.taught: dict[tuple[int, ...], Prompt] = {}

    def prompts(self, iteration: int) -> list[Prompt]:
        return [ask((name,), examples(), Form.SHORT) for name in ("vote", "row_top", "clipped")]

    def write(
        self,
        asked: Sequence[tuple[int, Prompt]],
        iteration: int,
        temperature: float,
        adapters: Sequence[Path],
        tick: Any,
    ) -> list[Sample]:
        self.asked.append([number for number, _ in asked])
        samples = super().write(asked, iteration, temperature, [], tick)
        return [
            replace(sample, text=corrected(prompt.text)) if "# Corrected:" in prompt.text else sample
            for sample, (_, prompt) in zip(samples, asked, strict=True)
        ]

    def refine(self, taught: Taught, *more: Any) -> dict[str, Any]:
        self.taught |= {chosen: prompt for prompt, chosen, _ in taught.pairs}
        self.taught |= {tokens: prompt for prompt, tokens in taught.imitated}
        return super().refine(taught, *more)


def corrected(prompt: str) -> str:
    [text] = [text for failing, text in CORRECTED.items() if failing in prompt]
    return text


def settings() -> Config:
    return scripted_config(
        programs=len(USUAL),
        factory={"model": "scripted", "repair_turn": True},
        preferences={"chosen_floor": 4, "failures_as_rejected": True, "failing_cap": 1, "pairs": 8},
        refinement={"imitation": {"passes": 1}},
        scaling={},
        rivals=[],
    )


@pytest.fixture(scope="module")
def factory() -> Correcting:
    return Correcting()


@pytest.fixture(scope="module")
def finished(factory: Correcting, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(settings(), tmp_path_factory.mktemp("turn") / "run", factory=factory)


@pytest.mark.parametrize("arm", ["learning", "frozen"])
def test_every_arm_writes_its_programs_and_every_one_ends_in_a_status(arm: str, finished: Run) -> None:
    written = finished.archive.candidates(arm, 0)
    assert [c.number for c in written] == list(range(12))
    assert [c.status for c in written] == [
        *("new", "failed", "failed", "failed", "trivial", "failed"),
        *("known", "failed", "new", "failed", "new", "repeated"),
    ]
    assert {(row["arm"], row["iteration"], row["written"]) for row in finished.summary()["iterations"]} == {
        (arm, t, 12) for arm in ("learning", "frozen") for t in (1, 2)
    }


def test_what_has_failed_is_asked_for_once_more_and_nothing_is_asked_twice(
    factory: Correcting, finished: Run
) -> None:
    # The frozen arm's first iteration is that of the learning arm.
    assert factory.asked == [list(range(6)), list(range(6, 12))] * 3


def test_a_turns_prompt_is_the_programs_own_with_the_program_and_its_error(finished: Run) -> None:
    [iteration, _] = finished.archive.iterations("learning")
    usual = [prompt.text for prompt in Correcting().prompts(0)]
    assert iteration.prompts[:3] == tuple(usual)
    written = finished.archive.candidates("learning", 0)
    assert [c.prompt for c in written] == [0, 0, 0, 0, 1, 1, 3, 4, 5, 2, 2, 2]
    for first, second in zip((1, 3, 5), (6, 7, 8), strict=True):
        prompt, failed = iteration.prompts[written[second].prompt], written[first]
        turn = f"\n\n# It fails: {failed.error}\n# Corrected:\ndef merge_"
        assert prompt == usual[failed.prompt] + failed.text + turn
        assert written[second].text == CORRECTED[failed.text]


def test_a_corrected_program_is_learned_under_the_prompt_that_it_was_sampled_under(
    factory: Correcting, finished: Run
) -> None:
    [iteration, _] = finished.archive.iterations("learning")
    written = finished.archive.candidates("learning", 0)
    taught = {c.number: factory.taught[c.tokens] for c in written if c.status == "new"}
    assert list(taught) == [0, 8, 10]
    assert {number: prompt.text for number, prompt in taught.items()} == {
        number: iteration.prompts[written[number].prompt] for number in taught
    }
    assert [prompt.examples for prompt in taught.values()] == [("vote",), ("row_top",), ("clipped",)]


def test_the_exported_pairs_have_the_turns_prompts(finished: Run, tmp_path: Path) -> None:
    export_pairs(finished, tmp_path / "pairs")
    lines = (tmp_path / "pairs" / "data" / "round-01.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["chosen_name"] == "learning/1/009"]
    assert rows
    assert all(SHAPE in row["prompt"] for row in rows)


def test_a_second_attempt_is_shown_as_one(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first = {}
    for number in range(1, 13):
        assert main(["show", str(finished.folder), f"frozen/1/{number:03d}", "--json"]) == 0
        first[number] = json.loads(capsys.readouterr().out)["corrects"]
    assert Counter(first.values())[None] == 9
    assert (first[7], first[8], first[9]) == ("frozen/1/002", "frozen/1/004", "frozen/1/006")
    assert main(["show", str(finished.folder), "learning/1/009"]) == 0
    assert "learning/1/006, which the factory was shown with its error" in capsys.readouterr().out


def test_a_failing_program_of_an_examples_name_in_the_prompt_makes_its_correction_no_copy(
    finished: Run,
) -> None:
    median = finished.candidate("learning/1/007")
    assert median.nearest == "example median"
    assert "def merge_median(" in finished.archive.iterations("learning")[0].prompts[median.prompt]
    assert all(row["copies"] == 0 for row in finished.summary()["iterations"] if row["iteration"] == 1)


def test_stopped_before_amid_and_after_the_turn_it_resumes_to_the_same_archive(
    finished: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(settings(), folder, factory=Correcting(), watch=Stopper("write:3"))
    for place in ("write:9", "write:15", "write:40"):  # the last one in the second iteration
        with pytest.raises(Interrupted):
            resume(folder, factory=Correcting(), watch=Stopper(place))
    resumed = resume(folder, factory=Correcting())
    assert resumed.archive.digest() == finished.archive.digest()


def test_one_program_cannot_be_halved() -> None:
    with pytest.raises(UserError, match=r"factory\.repair_turn: half of the programs come before it"):
        load_config("quickstart", ["factory.repair_turn=true", "programs=1", "prompt.prompts=1"])
