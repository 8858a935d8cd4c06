"""Models on a pretend GPU (`accelerator.py`): nothing meets across devices, and results are the CPU's up to rounding."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from accelerator import DEVICE, OnDevice, accelerator
from byte_model import byte_model, byte_tokenizer, save_byte_model
from scripted import Stopper, scripted_config
from selfdev.archive import Candidate
from selfdev.config import Config
from selfdev.errors import Interrupted
from selfdev.evaluation.evaluator import Evaluator
from selfdev.evaluation.measure import measure
from selfdev.evaluation.tasks import load_task
from selfdev.evaluation.tasks.grading import Grading, Way
from selfdev.factory.adapter import load_moments, save_learned, with_new_adapter
from selfdev.factory.assembly import Blueprint
from selfdev.factory.factory import LocalFactory
from selfdev.factory.grammar import Grammar
from selfdev.factory.imitation import Lesson, imitate
from selfdev.factory.memory import available, check_batch, fitting_pass, footprint
from selfdev.factory.packing import check_training
from selfdev.factory.refinement import Step, consult, refine
from selfdev.factory.sampling import Sample, Sampler
from selfdev.factory.trl_processes import Round
from selfdev.merging.task_vectors import read_task_vectors
from selfdev.models.device import Place
from selfdev.results import Run
from selfdev.runs import resume, run
from selfdev.sandbox import Sandbox
from selfdev.settings import RefinementSettings
from selfdev.zoo import zoo_models
from tiny import tiny_model

TYPES = (torch.float32, torch.bfloat16)
T = TypeVar("T")


@contextmanager
def on(device: str) -> Iterator[None]:
    """Within it, the device is there, and attention is computed in one way wherever it is."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        if device == "cpu":
            yield
        else:
            with accelerator(patch):
                yield


def on_both(compute: Callable[[str], T]) -> tuple[T, T]:
    """What comes of it on the CPU, and on the device."""
    found = []
    for device in ("cpu", "cuda"):
        with on(device):
            found.append(compute(device))
    return found[0], found[1]


def test_the_device_computes_as_the_cpu_and_refuses_what_lies_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, other = torch.randn(3, 4), torch.randn(4, 5)
    with accelerator(monkeypatch):
        there = here.to("cuda")
        product = there @ other.to("cuda")
        assert there.device == product.device == DEVICE
        assert torch.equal(product.cpu(), here @ other)
        assert not isinstance(product.cpu(), OnDevice)
        for mixed in (lambda: there @ other, lambda: there + here, lambda: torch.zeros(()).add_(there.sum())):
            with pytest.raises(RuntimeError, match="at least two devices"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="random stream"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        assert torch.equal(there[torch.tensor([2, 0])].cpu(), here[[2, 0]])  # indices may lie on the CPU
        assert (there + torch.tensor(1.0)).device == DEVICE  # and numbers
        places = torch.tensor([1, 1], device="cuda")
        leaf = there.clone().requires_grad_()
        gathered = leaf.gather(0, places[:, None].expand(2, 4))
        for twice in (leaf.index_select(0, places), gathered):
            with pytest.raises(RuntimeError, match="in any order"):
                twice.sum().backward()
        there.scatter_add_(1, places[:, None], torch.ones(2, 1, device="cuda"))  # one place a row


CUTS: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.8, "batch": 3}, {"min_p": 0.1, "grammar": True}]


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_sampled_is_what_the_cpu_samples(
    cut: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    prompts, rows = [list(range(1, 12)), [*range(1, 9), 40, 41], [7, 8]], [[1, 2, 3], [4, 5], [6]]
    tokenizer, dtype = byte_tokenizer(), TYPES["top_p" in cut]
    grammar = Grammar(tokenizer, 257) if "grammar" in cut else None
    settings = {"top_p": 1.0, **cut, "grammar": grammar}

    def written(device: str) -> list[list[Sample]]:
        model = byte_model().to(dtype).to(device)
        check_batch(model, [11], 3, 10, available(model.device))
        sampler = Sampler(1.0, max_new_tokens=8, stop=re.compile("never"), **settings)
        return sampler(model, tokenizer, prompts, rows)

    with caplog.at_level(logging.WARNING):
        expected, found = on_both(written)
    assert not caplog.records  # the prompts are shared there too
    for mine, its in zip(expected, found, strict=True):
        assert [each.tokens for each in mine] == [each.tokens for each in its]
        assert [each.log_prob for each in mine] == pytest.approx([each.log_prob for each in its], abs=1e-3)


PROMPT = (1, 2, 3, 4, 5)
PROGRAMS = ((6, 7, 8), (9,), (10, 11, 12, 13), (6, 7, 9))
STEPS = [Step(PROMPT, PROGRAMS[:2], ((0, 1),)), Step(PROMPT, PROGRAMS[1:], ((1, 2),), (0,))]
FULL = {"train": "full", "refit": "continue", "reference": "first", "optimizer": "continue"}


@pytest.mark.parametrize(
    ("dtype", "tokens_a_pass", "settings"),
    [
        (torch.float32, None, {}),
        (torch.float32, 9, {"kl": 0.1, "loss": "kto"}),
        (torch.float32, None, {"loss": "ipo"}),
        (torch.float32, None, FULL),
        (torch.bfloat16, 9, {"kl": 0.1, "kl_direction": "forward"}),
        (torch.bfloat16, None, FULL),
    ],
)
def test_what_is_learned_is_what_the_cpu_learns(
    dtype: torch.dtype, tokens_a_pass: int | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    chosen = RefinementSettings(
        **{"learning_rate": 5e-3, "supervised": 0.1, "beta": 0.5, "epochs": 2} | settings
    )

    def learned(device: str) -> tuple[list[float], Tensor]:
        model = tiny_model().to(dtype).to(device)
        check_training(model)
        whole = chosen.train == "full"
        trainee: Any = (
            model.requires_grad_(True) if whole else with_new_adapter(model.requires_grad_(False), 4, 0)
        )
        assert fitting_pass(trainee, STEPS, chosen, available(model.device)) is None
        taken = footprint(trainee, chosen.kl > 0)
        trained = [p for p in trainee.parameters() if p.requires_grad]
        start = [p.detach().cpu().float().clone() for p in trained]
        references = consult(trainee, STEPS, chosen, tokens_a_pass)
        done = refine(trainee, STEPS, references, chosen, tokens_a_pass=tokens_a_pass)
        save_learned(trainee, tmp_path / device, done.moments)
        if whole:
            moments = load_moments(tmp_path / device)
            done = refine(trainee, STEPS, references, chosen, moments=moments)
        losses = imitate(trainee, [Lesson(PROMPT, PROGRAMS[:2])] * 2, 1e-3, tokens_a_pass=tokens_a_pass)
        losses += [
            taken.fixed,
            taken.a_token,
            done.losses[-1].dpo,
            done.losses[-1].margin,
            done.losses[-1].kl or 0.0,
        ]
        assert {p.device.type for p in trainee.parameters()} == {device}
        moved = [p.detach().cpu().float() - before for p, before in zip(trained, start, strict=True)]
        return losses, torch.cat([each.flatten() for each in moved])

    (expected, moved), (found, others) = on_both(learned)
    close = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    assert found == pytest.approx(expected, rel=close, abs=close)
    assert (others - moved).norm() < 4 * close * moved.norm()


@pytest.mark.parametrize("asked", ["cpu", "cuda"])
def test_an_adapter_is_read_to_where_the_model_is(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, adapter = save_byte_model(tmp_path / "model"), tmp_path / "adapter"
    save_learned(with_new_adapter(byte_model(), 4, 0), adapter)
    made: list[str] = []
    new = OnDevice.__new__
    with accelerator(monkeypatch):
        monkeypatch.setattr(OnDevice, "__new__", lambda *args: made.append("there") or new(*args))
        model = Blueprint(folder, (adapter,)).load("float32", asked)
        settings = RefinementSettings()
        part = Round(Blueprint(folder), None, asked, "float32", folder, settings, 0.0, 1, None, [])
        trainee = part.trainee(adapter, asked)  # as a process of several has it
    assert model.device.type == trainee.device.type == asked
    assert bool(made) == (asked == "cuda")  # a GPU that was not asked for is left alone


@pytest.mark.parametrize("way", list(Way))
def test_candidates_have_the_scores_of_the_cpu(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, task = zoo_models("nano"), load_task("nano")
    monkeypatch.setattr(task, "grading", Grading(way, max_new_tokens=4))
    vectors = read_task_vectors(zoo["seed"], zoo["experts"], "all")
    source = (
        "import torch\n\ndef merge_models(model_dict, device):\n"
        "    d = torch.stack(list(model_dict.values()))\n    return 0.3 * d.sum(0).abs() * d.sign().mean(0)\n"
    )
    written = Candidate("learning/1/001", "learning", 0, 0, 0, source, (), None, True, source)

    def scored(device: str, dtype: str) -> list[Any]:
        with Sandbox() as box:
            place = Place.of(device, dtype, "task.device")
            scorer = Evaluator(zoo["seed"], vectors, task, 12, box, 1, place=place)
            seed = {name: tensor.cpu().clone() for name, tensor in scorer.model.state_dict().items()}
            evaluations = [
                scorer.seed(),
                scorer.rival("task_arithmetic", 0, {"scale": 0.4}),
                scorer.candidate(written),
                scorer.candidate(written, number=1, norm=1.5, asked=[3, 1, 5]),
            ]
            assert scorer.model.device.type == device
            for name, tensor in scorer.model.state_dict().items():
                assert torch.equal(tensor.cpu(), seed[name])
            return [outcome for each in evaluations for outcome in each.outcomes or ()]

    dtype = "float32" if way is Way.EXACT else "bfloat16"
    expected, found = on_both(lambda device: scored(device, dtype))
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_model_is_measured_on_the_device() -> None:
    source = str(zoo_models("nano")["seed"])
    expected, found = on_both(
        lambda device: measure(source, "nano", limit=12, place=Place.of(device, "float32", "--device"))
    )
    assert found.place == "cuda float32"
    assert found.answers == expected.answers


NEW = [
    "c(deltas):\n    m = sum(deltas)\n    return 0.3 * torch.roll(m, 1, 0)\n\n",
    "a(deltas):\n    return sum(deltas).abs()\n\n",
    "i(deltas):\n    return deltas + None\n\n",
    "b(deltas):\n    m = sum(deltas)\n    return 0.3 * m * m.abs()\n\n",
]


class Prompted(LocalFactory):
    """Samples in earnest, of which nothing would run, and is said to have written what does; it learns from that."""

    def write(self, asked: Any, iteration: int, *rest: Any) -> list[Sample]:
        written = super().write(asked, iteration, *rest)
        texts = [NEW[number % len(NEW)] for number, _ in asked]
        if iteration:  # what was sampled shows in what is archived
            texts = [f"{text}# {each.tokens}" for text, each in zip(texts, written, strict=True)]
        return [
            Sample(self.tokens(text), text, each.log_probs, True)
            for text, each in zip(texts, written, strict=True)
        ]


def small_run(model: Path, device: str) -> Config:
    return scripted_config(
        programs=4,
        factory={"model": str(model), "device": device, "max_new_tokens": 8, "batch": 4},
        prompt={"form": "short", "names": ["vote"]},
        task={"name": "nano", "device": device, "development": 12, "test": 12},
        preferences={"chosen_floor": 1, "failures_as_rejected": True, "pairs": 3},
        refinement={
            "rank": 4,
            "learning_rate": 1e-2,
            "kl": 0.1,
            "min_pairs": 1,
            "refit": "continue",
            "imitation": {"passes": 1},
        },
        scaling={"norm": 1.5, "programs": 1, "factors": [0.5]},
        rivals=["task_arithmetic"],
        controls=[],
        jail={"wall_seconds": 10.0},
    )


def archived(found: Run) -> tuple[list[tuple[str | None, str, float]], list[Any], list[Any]]:
    """Texts, scores and losses of a run."""
    texts = [(c.text, c.status) for i in (0, 1) for c in found.archive.candidates("learning", i)]
    kinds = ("seed", "rival", "candidate", "scaled")
    scores = [(e.subject, e.split, e.score) for kind in kinds for e in found.archive.evaluations(kind)]
    [refinement] = found.archive.refinements("learning")
    facts = refinement.facts
    return texts, scores, [*facts["imitation_losses"], *facts["losses"][0].values()]


def test_a_run_on_the_device_is_that_of_the_cpu_and_resumes(tmp_path: Path) -> None:
    model = save_byte_model(tmp_path / "model")

    def ended(device: str) -> Any:
        config, folder = small_run(model, device), tmp_path / device
        if device == "cuda":
            with pytest.raises(Interrupted):
                run(config, folder, factory=Prompted(config), watch=Stopper("refine:3"))
            return archived(resume(folder, factory=Prompted(config)))
        return archived(run(config, folder, factory=Prompted(config)))

    (texts, scores, losses), (its_texts, its_scores, its_losses) = on_both(ended)
    assert its_texts == texts
    assert its_scores == scores
    assert its_losses == pytest.approx(losses, abs=1e-4)
