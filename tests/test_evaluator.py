"""What is noted of a candidate when it is merged on the experts themselves."""

from dataclasses import replace

import pytest
import torch

from selfdev.archive import Candidate
from selfdev.errors import UserError
from selfdev.evaluation.evaluator import Evaluator
from selfdev.evaluation.tasks import load_task
from selfdev.evaluation.tasks.grading import Grading, Way
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.models.device import Place
from selfdev.sandbox import Sandbox
from selfdev.zoo import zoo_models

PROGRAM = """import torch

def merge_models(model_dict, device):
    d = torch.stack(list(model_dict.values()))
    return {}
"""


@pytest.fixture(scope="module")
def changes() -> dict[str, float]:
    """By how much the output of each returned value changes where the experts change places."""
    values = ("d.sum(0).abs() * d.amax(0)", "d[0].abs() * d[1]")
    zoo = zoo_models("nano")
    vectors = read_task_vectors(zoo["seed"], zoo["experts"], "mlp")
    found = {}
    with Sandbox() as box:
        scorer = Evaluator(zoo["seed"], vectors, load_task("nano"), 12, box, 1)
        for number, value in enumerate(values):
            source = PROGRAM.format(value)
            written = Candidate(
                f"learning/1/{number}", "learning", 0, number, 0, source, (), None, True, source
            )
            found[value] = scorer.candidate(written, "development").parameters["change_by_order"]
    return found


def test_a_program_that_treats_all_experts_alike_does_not_change(changes: dict[str, float]) -> None:
    assert changes["d.sum(0).abs() * d.amax(0)"] == pytest.approx(0, abs=1e-5)


def test_a_program_that_picks_experts_by_their_place_changes(changes: dict[str, float]) -> None:
    assert changes["d[0].abs() * d[1]"] > 0.5


def test_a_tensor_that_the_model_has_under_another_name_is_refused() -> None:
    zoo = zoo_models("nano")
    vectors = read_task_vectors(zoo["seed"], zoo["experts"], "mlp")
    [name, *_] = vectors.seed
    seed = {f"old.{name}" if each == name else each: tensor for each, tensor in vectors.seed.items()}
    with (
        Sandbox() as box,
        pytest.raises(UserError, match=rf"merge\.targets: 'old\.{name}' .*save_pretrained"),
    ):
        Evaluator(zoo["seed"], replace(vectors, seed=seed), load_task("nano"), 12, box, 1)


@pytest.mark.parametrize("way", list(Way))
def test_models_answer_in_the_type_that_is_asked_for(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, task = zoo_models("nano"), load_task("nano")
    monkeypatch.setattr(task, "grading", Grading(way, max_new_tokens=4))
    vectors = read_task_vectors(zoo["seed"], zoo["experts"], "all")
    source = PROGRAM.format("0.3 * d.sum(0)")
    written = Candidate("learning/1/001", "learning", 0, 0, 0, source, (), None, True, source)
    scores = {}
    with Sandbox() as box:
        for dtype in (torch.float32, torch.bfloat16):
            place = Place(torch.device("cpu"), dtype)
            scorer = Evaluator(zoo["seed"], vectors, task, 120, box, 1, place=place)
            seed = {name: tensor.clone() for name, tensor in scorer.model.state_dict().items()}
            assert {tensor.dtype for tensor in scorer.model.parameters()} == {dtype}
            merged = scorer.rival("task_arithmetic", 0, {"scale": 0.4})
            assert scorer.merge(written)  # what it makes stays of float32
            scores[dtype] = [scorer.seed().score, merged.score]
            for name, tensor in scorer.model.state_dict().items():
                assert torch.equal(tensor, seed[name])
    exact, rounded = scores.values()
    assert exact != rounded  # it is another type indeed
    assert exact == pytest.approx(rounded, abs=0.05 if way is not Way.LOGLIKELIHOOD else 0.1)
