"""Rounds of learning that come to nothing: the run goes on with the factory that it had."""

from pathlib import Path
from typing import Any

import pytest

from scripted import PROGRAMS, ScriptedFactory, scripted_config
from selfdev.cli import main
from selfdev.runs import run


class Unlucky(ScriptedFactory):
    """Its rounds end without an adapter."""

    def __init__(self, facts: dict[str, Any]):
        super().__init__(PROGRAMS[:8])
        self.outcome = facts
        self.flip_rates: list[float] = []

    def refine(self, *_: Any, **__: Any) -> dict[str, Any]:
        self.flip_rates.append(_[5])
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
