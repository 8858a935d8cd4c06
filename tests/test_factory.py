"""The whole cycle once with a real transformer: real sampling, real DPO, real adapters. No part is scripted."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenacity import Retrying, stop_after_delay, wait_fixed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripted import begin_or_resume, killed, writer_config
from selfdev.algorithms.examples import examples
from selfdev.algorithms.screening import Screen
from selfdev.algorithms.source import Form
from selfdev.errors import SelfdevError, UserError
from selfdev.factory.adapter import load_moments, remove_left, save_learned, with_new_adapter
from selfdev.factory.factory import LocalFactory
from selfdev.factory.memory import SHARE, available, footprint, footprint_of_trl
from selfdev.factory.prompt import Prompt, ask
from selfdev.factory.refinement import Diverged
from selfdev.factory.taught import Taught
from selfdev.factory.trl_processes import check_devices
from selfdev.models.folder import load_model, weights_hash
from selfdev.results import Run
from selfdev.runs import resume, run
from selfdev.sandbox import Sandbox
from selfdev.watcher import Silent, Tick
from selfdev.writing import Writing

LESSONS = [
    "r(deltas):\n    return torch.roll(sum(deltas), 1, 0)\n",
    "a(deltas):\n    return sum(deltas).abs()\n",
    "t(deltas):\n    return 0.3 * sum(deltas)\n",
    "f(deltas):\n    return deltas + None\n",
]
"""What the tiny model is taught to write: two new programs, a trivial one, a failing one."""


Free = Callable[[torch.device], int | None]


@pytest.fixture(scope="module")
def tiny_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.3 M parameters that has been taught the lessons by heart, more or less."""
    folder = tmp_path_factory.mktemp("writer") / "model"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*examples().values(), *LESSONS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            eos_token_id=fast.eos_token_id,
            bos_token_id=None,
        )
    )
    prompt = ask(("vote",), examples(), Form.SHORT).tokens(fast)
    lessons = [prompt + fast(text + "\n\n").input_ids for text in LESSONS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(200):
        ids = torch.tensor([lessons[step % len(lessons)]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ended(tiny_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return begin_or_resume(tmp_path_factory.mktemp("unbroken") / "run", model=tiny_writer)


def twenty(factory: LocalFactory) -> list[tuple[int, Prompt]]:
    """What an iteration asks for: numbers, and the one prompt."""
    return list(enumerate(factory.prompts(0) * 20))


def test_the_cycle_with_a_real_transformer(ended: Run) -> None:
    [refinement] = ended.archive.refinements("learning")
    assert refinement.adapter is not None
    losses = refinement.facts["losses"][0]
    assert 0 < losses["dpo"] < 2
    assert refinement.facts["reference"] == "first"
    assert (ended.folder / refinement.adapter / "adapter_model.safetensors").is_file()
    first = {arm: [c.text for c in ended.archive.candidates(arm, 0)] for arm in ("learning", "frozen")}
    assert first["learning"] == first["frozen"]
    assert any(c.status == "new" for c in ended.archive.candidates("learning", 0))
    second = {arm: [c.text for c in ended.archive.candidates(arm, 1)] for arm in ("learning", "frozen")}
    assert second["learning"] != second["frozen"]
    assert ended.best is not None
    assert len(ended.archive.run.facts["factory"]["weights"]) == 64


@pytest.mark.parametrize(
    "kill_at", [["write:30", "refine:3"], pytest.param(["refine:7", "judge:30"], marks=pytest.mark.proof)]
)
def test_killed_anywhere_a_real_factory_resumes_to_the_same_archive(
    kill_at: list[str], tiny_writer: Path, ended: Run, tmp_path: Path
) -> None:
    for place in kill_at:
        killed(tmp_path / "run", place, tiny_writer)
    resumed = begin_or_resume(tmp_path / "run", model=tiny_writer)
    assert resumed.archive.digest() == ended.archive.digest()


def test_what_is_written_is_a_function_of_the_index(tiny_writer: Path) -> None:
    factory = LocalFactory(writer_config(tiny_writer))
    asked = twenty(factory)
    written = factory.write(asked, 0, 0.8, [], lambda *_: None)
    assert factory.write(asked, 0, 0.8, [], lambda *_: None) == written
    assert factory.write(asked, 1, 0.8, [], lambda *_: None) != written
    assert len(written) == 20


def with_repair_turn(writer: Path, **factory: Any) -> LocalFactory:
    config = writer_config(writer)
    settings = config.factory.model_copy(update={"repair_turn": True, **factory})
    return LocalFactory(config.model_copy(update={"factory": settings}))


@pytest.mark.parametrize("batch", [8, 1])
def test_what_fails_is_written_once_more_by_a_real_transformer(batch: int, tiny_writer: Path) -> None:
    factory = with_repair_turn(tiny_writer, batch=batch)
    with Sandbox() as box:
        writing = Writing(factory.config, factory, Screen(box), "frozen", 0, [], Tick())
        prompts, written = writing.write(factory.prompts(0))
        assert writing.write(factory.prompts(0)) == (prompts, written)
    assert len(written) == 20
    failed = [c for c in written[:10] if c.source is not None and c.status == "failed"]
    assert len(prompts) - 1 == len(failed) > 0
    assert [c.prompt for c in written[10:]] == [*range(1, len(prompts)), *[0] * (10 - len(failed))]
    model = factory.model([])
    for candidate in written[10:]:
        prompt = prompts[candidate.prompt].tokens(factory.tokenizer)
        ids = torch.tensor([[*prompt, *candidate.tokens]])
        log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        assert candidate.log_probs == pytest.approx(expected.tolist(), abs=1e-4)
        assert candidate.log_prob == pytest.approx(expected.sum().item(), abs=1e-3)


def test_a_turns_prompt_must_fit_the_model_before_anything_is_written(tiny_writer: Path) -> None:
    with pytest.raises(UserError, match=r"set factory\.repair_turn: false, use fewer examples"):
        with_repair_turn(tiny_writer, max_new_tokens=400)
    LocalFactory(writer_config(tiny_writer).model_copy(update={"programs": 1}))
    with_repair_turn(tiny_writer, max_new_tokens=200)


def warming(writer: Path, free: Free = available, **warm_start: Any) -> LocalFactory:
    """A factory with a warm start of two steps."""
    config = writer_config(writer)
    warm = {"warm_start": {"steps": 2, "rank": 2, "targets": 2, **warm_start}}
    settings = type(config.factory)(**config.factory.model_dump() | warm)
    # One iteration, after which nothing is learned.
    return LocalFactory(config.model_copy(update={"factory": settings, "iterations": 1}), free)


def test_the_warm_start_is_cached_and_changes_what_is_written(
    tiny_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path))
    warm = warming(tiny_writer)
    ticks: list[int] = []
    warm.prepare(lambda done, total, note: ticks.append(done))
    assert ticks == [1, 2]
    assert warm.facts["warm_start"]
    warm.prepare(lambda done, total, note: ticks.append(done))
    assert ticks == [1, 2]
    cold = LocalFactory(writer_config(tiny_writer))
    assert cold.facts["warm_start"] is None
    asked = twenty(cold)
    assert warm.write(asked, 0, 0.8, [], lambda *_: None) != cold.write(asked, 0, 0.8, [], lambda *_: None)
    monkeypatch.setattr("selfdev.factory.prompt.SHORT_HEAD", "# Merge experts.\n\n")
    warming(tiny_writer).prepare(lambda done, total, note: ticks.append(done))
    assert ticks == [1, 2, 1, 2]


def test_a_warm_start_that_diverges_ends_with_an_error_and_is_not_cached(
    tiny_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path))
    for rate, steps in ((1e30, 3), (1e39, 1)):  # a loss, and a weight after the last loss
        warm = warming(tiny_writer, learning_rate=rate, steps=steps)
        with pytest.raises(Diverged, match=r"lower factory\.warm_start\.learning_rate"):
            warm.prepare(lambda *_: None)
        assert not any(tmp_path.rglob("*.safetensors"))


def test_a_warm_start_takes_smaller_passes_where_memory_is_little(
    tiny_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path))
    needs = footprint(with_new_adapter(load_model(tiny_writer), 2, 0), kl=False)
    few = int(needs.of(800) / SHARE) + 10
    warming(tiny_writer, lambda device: few, targets=8).prepare(lambda *_: None)
    assert "factory.warm_start: a pass of" in caplog.text
    assert "at most 800 tokens instead" in caplog.text
    with pytest.raises(SelfdevError, match=r"take a lower factory\.warm_start\.rank"):
        warming(tiny_writer, lambda device: needs.of(1), seed=5).prepare(lambda *_: None)


def test_a_round_shuns_the_examples_that_its_prompts_show(tiny_writer: Path, tmp_path: Path) -> None:
    config = writer_config(tiny_writer)
    shunning = config.refinement.model_copy(update={"shun_examples": 1, "rehearsal": 1, "epochs": 1})
    factory = LocalFactory(config.model_copy(update={"refinement": shunning}))
    [prompt] = factory.prompts(0)
    chosen, rejected = factory.write(twenty(factory)[:2], 0, 1.0, [], lambda *_: None)
    pairs = [(prompt, chosen.tokens, rejected.tokens)]
    taught = Taught(pairs, flip_rate=0.2)
    facts = factory.refine(taught, 0, [], tmp_path / "adapter", lambda *_: None)
    assert prompt.examples == ("vote",)
    # What is shunned is surely the right way round.
    assert (facts["pairs"], facts["shunned"], facts["flip_rate"]) == (1, 1, 0.1)


def test_a_round_can_imitate_alone(tiny_writer: Path, tmp_path: Path) -> None:
    config = writer_config(tiny_writer)
    imitation = config.refinement.imitation.model_copy(update={"passes": 24, "learning_rate": 1e-2})
    settings = config.refinement.model_copy(update={"imitation": imitation})
    factory = LocalFactory(config.model_copy(update={"refinement": settings}))
    [prompt] = factory.prompts(0)
    wanted = factory.tokens(LESSONS[0] + "\n\n")
    facts = factory.refine(Taught([], [(prompt, wanted)]), 0, [], tmp_path / "a", lambda *_: None)
    assert facts["imitation_steps"] == len(facts["imitation_losses"]) == 24
    assert facts["imitation_losses"][-1] < facts["imitation_losses"][0]
    written = [
        factory.write(twenty(factory), 1, 0.2, adapters, lambda *_: None)
        for adapters in ([], [tmp_path / "a"])
    ]
    before, after = (
        sum(sample.text.strip() == LESSONS[0].strip() for sample in samples) for samples in written
    )
    assert after > before
    # Without programs and pairs there is nothing to learn.
    assert "skipped" in factory.refine(Taught([]), 0, [], tmp_path / "b", lambda *_: None)


Pairs = list[tuple[Prompt, tuple[int, ...], tuple[int, ...]]]


def learner(writer: Path, free: Free = available, **refinement: Any) -> tuple[LocalFactory, Pairs]:
    """A factory with these settings, and two pairs of programs that it has written."""
    config = writer_config(writer)
    settings = type(config.refinement)(**{**config.refinement.model_dump(), "epochs": 2, **refinement})
    factory = LocalFactory(config.model_copy(update={"refinement": settings}), free)
    [prompt] = factory.prompts(0)
    written = factory.write(twenty(factory)[:4], 0, 1.0, [], lambda *_: None)
    a, b, c, d = (sample.tokens for sample in written)
    return factory, [(prompt, a, b), (prompt, c, d)]


def test_a_round_that_diverges_is_rolled_back(tiny_writer: Path, tmp_path: Path) -> None:
    factory, pairs = learner(tiny_writer, learning_rate=1e30)
    facts = factory.refine(Taught(pairs), 0, [], tmp_path / "adapter", lambda *_: None)
    assert "lower refinement.learning_rate" in facts["rolled_back"]
    assert facts["pairs"] == 2
    assert not list(tmp_path.iterdir())


def test_an_imitation_that_breaks_the_weights_with_its_last_step_is_rolled_back(
    tiny_writer: Path, tmp_path: Path
) -> None:
    """No pair follows whose loss would tell."""
    factory, [(prompt, wanted, _), _] = learner(tiny_writer, imitation={"passes": 1, "learning_rate": 1e39})
    facts = factory.refine(Taught([], [(prompt, wanted)]), 0, [], tmp_path / "adapter", lambda *_: None)
    assert facts["rolled_back"].startswith("a weight of an imitation is not a finite number")
    assert "refinement.imitation.learning_rate" in facts["rolled_back"]
    assert not list(tmp_path.iterdir())


def test_a_round_takes_smaller_passes_where_memory_is_little(
    tiny_writer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It learns the same."""
    needs = footprint(with_new_adapter(load_model(tiny_writer), 8, 0), kl=False)
    taught = {"imitation": {"passes": 1}, "learning_rate": 1e-3, "epochs": 1}
    factory, pairs = learner(tiny_writer, **taught)
    prompt, *_ = pairs[0]
    length = len(prompt.tokens(factory.tokenizer))
    programs = [tokens for _, *both in pairs for tokens in both]
    one = length + max(map(len, programs))
    assert one < length + sum(map(len, programs))
    little = int(needs.of(one) / SHARE) + 10
    found = {}
    for name, free in (("ample", None), ("little", little)):
        factory, _ = learner(tiny_writer, lambda device, free=free: free, **taught)  # type: ignore[misc]
        imitated = [(prompt, program) for program in programs]
        found[name] = factory.refine(Taught(pairs, imitated), 0, [], tmp_path / name, lambda *_: None)
    assert (found["ample"]["tokens_a_pass"], found["little"]["tokens_a_pass"]) == (None, one)
    assert f"passes of at most {one} tokens instead" in caplog.text
    for name in ("imitation_losses", "steps"):
        assert found["little"][name] == pytest.approx(found["ample"][name], rel=1e-4)
    for key, loss in found["ample"]["losses"][0].items():
        assert found["little"]["losses"][0][key] == (loss and pytest.approx(loss, abs=1e-3))
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in found]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-2)
    with pytest.raises(SelfdevError, match=r"take a lower refinement\.rank"):
        learner(tiny_writer, lambda device: needs.of(one), **taught)[0].refine(
            Taught(pairs), 0, [], tmp_path / "none", lambda *_: None
        )
    assert not (tmp_path / "none").exists()


def test_a_gpu_that_is_out_of_memory_ends_the_session_with_the_way_out(
    tiny_writer: Path, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    factory, pairs = learner(tiny_writer)
    with pytest.raises(SelfdevError, match=r"2\.00 GiB\. Free memory.*lower refinement\.pairs_a_step"):
        factory.refine(Taught(pairs), 0, [], tmp_path / "adapter", full)
    assert not (tmp_path / "adapter").exists()


def test_a_batch_that_does_not_fit_ends_the_run_before_it_begins(tiny_writer: Path, tmp_path: Path) -> None:
    config = writer_config(tiny_writer)
    with pytest.raises(UserError, match=r"factory\.batch: sampling 8 programs at once"):
        run(config, tmp_path / "run", factory=LocalFactory(config, lambda device: 500_000))
    assert not (tmp_path / "run" / "archive.db").exists()


def test_a_round_that_does_not_fit_ends_the_run_before_it_begins(tiny_writer: Path, tmp_path: Path) -> None:
    config = writer_config(tiny_writer)
    config = config.model_copy(update={"factory": config.factory.model_copy(update={"batch": 1})})
    model = with_new_adapter(load_model(tiny_writer), config.refinement.rank, 0)
    needs = footprint(model, kl=False).of(config.factory.max_new_tokens)
    with pytest.raises(SelfdevError, match=r"refinement: training on one program of \d+ tokens"):
        run(config, tmp_path / "run", factory=LocalFactory(config, lambda device: needs))
    assert not (tmp_path / "run" / "archive.db").exists()
    frozen = config.model_copy(update={"iterations": 1})  # nothing is learned after the last iteration
    LocalFactory(frozen, lambda device: needs).prepare(lambda *_: None)


def test_a_second_model_as_reference_is_reckoned_before_the_run(tiny_writer: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    held = {"refit": "continue", "backend": "trl", "pairs_a_step": 1}
    factory, _ = learner(tiny_writer, **held, reference="previous")
    small = factory.config.factory.model_copy(update={"batch": 1})
    config = factory.config.model_copy(update={"factory": small})
    model = with_new_adapter(load_model(tiny_writer), config.refinement.rank, 0)
    needs = footprint_of_trl(model)
    prompt = max(
        len(p.tokens(factory.tokenizer)) for t in range(config.iterations) for p in factory.prompts(t)
    )
    enough = int(needs.of(2 * (prompt + small.max_new_tokens)) / SHARE) + 10
    LocalFactory(config, lambda device: enough).prepare(lambda *_: None)
    other = config.model_copy(
        update={"refinement": config.refinement.model_copy(update={"reference": "first"})}
    )
    with pytest.raises(SelfdevError, match="one pair of"):
        LocalFactory(other, lambda device: enough).prepare(lambda *_: None)


def test_the_prompts_of_all_iterations_and_arms_must_fit_the_model(tiny_writer: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_writer, tmp_path / "model")
    config = writer_config(model)
    config = config.model_copy(
        update={
            "iterations": 3,
            "controls": (),
            "prompt": config.prompt.model_copy(update={"examples": "drawn", "shown": 3, "prompts": 2}),
        }
    )
    factory = LocalFactory(config)
    limit = config.factory.max_new_tokens
    lengths = [max(len(p.tokens(factory.tokenizer)) for p in factory.prompts(t)) for t in range(3)]
    assert lengths[0] < max(lengths), "the first iteration has the longest prompt: take another seed"

    def with_context(tokens: int, **changes: Any) -> None:
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": tokens}))
        LocalFactory(config.model_copy(update=changes))

    with_context(max(lengths) + limit)
    with_context(lengths[0] + limit, iterations=1)
    with pytest.raises(UserError, match="do not fit"):
        with_context(max(lengths) + limit - 1)
    # An arm that shows what it has written may ask by a longer program than any example is.
    long = config.factory.model_copy(update={"max_new_tokens": 4 * limit})
    with_context(max(lengths) + 4 * limit, factory=long)
    with pytest.raises(UserError, match="do not fit"):
        with_context(max(lengths) + 4 * limit, factory=long, controls=("feedback",))


def test_looking_whether_a_round_fits_leaves_the_model_as_it_was(tiny_writer: Path) -> None:
    for train in ("lora", "full"):
        factory, _ = learner(tiny_writer, train=train)
        [before, after] = ({}, {})
        for found in (before, after):
            model = factory.model([])
            found["modules"] = {name: type(module) for name, module in model.named_modules()}
            found["hooks"] = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
            found["weights"] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            found["trained"] = [weight.requires_grad for weight in model.parameters()]
            factory.prepare(lambda *_: None)
        assert factory.model([]) is model
        weights = before.pop("weights"), after.pop("weights")
        assert before == after
        assert not any(after["trained"])
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_save_that_fails_midway_leaves_nothing(tiny_writer: Path, tmp_path: Path) -> None:
    """The disk takes the small files of an adapter, and not all of its weights."""
    model = with_new_adapter(load_model(tiny_writer), rank=64, seed=0)
    save_learned(model, tmp_path / "whole")
    before = weights_hash(tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        for name in ("new", "whole"):
            with pytest.raises(SelfdevError, match=r"could not be written.*is the disk full"):
                save_learned(model, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["whole"]
    assert weights_hash(tmp_path / "whole") == before


def test_a_round_of_too_few_pairs_is_skipped(tiny_writer: Path, tmp_path: Path) -> None:
    factory, pairs = learner(tiny_writer, min_pairs=3)
    facts = factory.refine(Taught(pairs), 0, [], tmp_path / "adapter", lambda *_: None)
    assert facts == {"skipped": "2 pairs, fewer than refinement.min_pairs (3)"}
    assert not list(tmp_path.iterdir())


def test_of_too_few_pairs_nothing_is_preferred_where_programs_are_imitated(
    tiny_writer: Path, tmp_path: Path
) -> None:
    factory, pairs = learner(tiny_writer, min_pairs=3, imitation={"passes": 1})
    imitated = [(prompt, chosen) for prompt, chosen, _ in pairs]
    facts = factory.refine(Taught(pairs, imitated), 0, [], tmp_path / "adapter", lambda *_: None)
    assert facts["preferences_skipped"] == "2 pairs, fewer than refinement.min_pairs (3)"
    assert (facts["pairs"], facts["steps"], facts["losses"]) == (0, 0, [])
    assert facts["imitation_steps"] > 0
    assert (tmp_path / "adapter").is_dir()


def test_what_a_killed_process_left_is_removed_when_a_round_is_saved(
    tiny_writer: Path, tmp_path: Path
) -> None:
    left = tmp_path / ".adapter.99999"
    left.mkdir()
    factory, pairs = learner(tiny_writer)
    factory.refine(Taught(pairs), 0, [], tmp_path / "adapter", lambda *_: None)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("refit", "reference", "held_to", "moved"),
    [
        ("continue", None, "previous", False),
        ("continue", "first", "first", True),
        ("fresh", None, "first", False),
        ("fresh", "previous", "previous", True),
    ],
)
def test_what_a_second_round_stands_on_and_what_it_is_held_to(
    refit: str, reference: str | None, held_to: str, moved: bool, tiny_writer: Path, tmp_path: Path
) -> None:
    """Where both are one, the first step of a round has margin 0."""
    factory, pairs = learner(tiny_writer, refit=refit, reference=reference, epochs=1)
    first = tmp_path / "1"
    factory.refine(Taught(pairs), 0, [], first, lambda *_: None)
    ticks: list[int] = []
    facts = factory.refine(Taught(pairs), 1, [first], tmp_path / "2", lambda done, *_: ticks.append(done))
    assert (facts["refit"], facts["reference"]) == (refit, held_to)
    assert facts["steps"] == 1
    assert (abs(facts["losses"][0]["margin"]) > 1e-2) == moved
    assert ticks == [1, 2]


def test_the_flip_rate_is_that_of_the_pairs_or_the_settings(tiny_writer: Path, tmp_path: Path) -> None:
    for named, measured, used in (("measured", 0.2, 0.2), ("measured", 0.5, 0.45), (0.1, 0.2, 0.1)):
        factory, pairs = learner(tiny_writer, loss="robust", flip_rate=named, epochs=1)
        taught = Taught(pairs, flip_rate=measured)
        facts = factory.refine(taught, 0, [], tmp_path / "a", lambda *_: None)
        assert (facts["loss"], facts["flip_rate"]) == ("robust", used)


def test_a_round_by_trl(tiny_writer: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    facts = {}
    for backend in ("own", "trl"):
        factory, pairs = learner(tiny_writer, backend=backend, learning_rate=1e-3, reference="previous")
        facts[backend] = factory.refine(Taught(pairs), 0, [], tmp_path / backend, lambda *_: None)
        assert facts[backend]["backend"] == backend
    assert facts["trl"].keys() == facts["own"].keys()
    for ours, theirs in zip(facts["own"]["losses"], facts["trl"]["losses"], strict=True):
        assert theirs["dpo"] == pytest.approx(ours["dpo"], abs=1e-3)
        assert theirs["supervised"] == pytest.approx(ours["supervised"], abs=1e-3)
    factory, _ = learner(tiny_writer)
    asked = twenty(factory)
    assert factory.write(asked, 1, 1.0, [tmp_path / "trl"], lambda *_: None) != factory.write(
        asked, 1, 1.0, [], lambda *_: None
    )


@pytest.mark.parametrize(
    ("rounds", "file", "more"),
    [
        (1, "adapter_model.safetensors", {"imitation": {"passes": 1}}),
        pytest.param(
            2,
            "adapter_model.safetensors",
            {"optimizer": "continue", "refit": "continue"},
            marks=pytest.mark.proof,
        ),
        pytest.param(
            2,
            "model.safetensors",
            {"train": "full", "optimizer": "continue", "refit": "continue"},
            marks=pytest.mark.proof,
        ),
    ],
    ids=["lora", "one adapter", "full"],
)
def test_devices_learn_together_what_one_learns(
    rounds: int, file: str, more: dict[str, Any], tiny_writer: Path, tmp_path: Path
) -> None:
    """Two rounds where the second trains what the first has saved."""
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    asked = {"backend": "trl", "learning_rate": 1e-3, "pairs_a_step": 4, "supervised": 0.0, **more}
    facts: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for devices, done in facts.items():
        factory, pairs = learner(tiny_writer, **asked, devices=devices)
        pairs = [*pairs, *((p, chosen, rejected[:-1]) for p, chosen, rejected in pairs), *pairs]
        imitated = [(prompt, chosen) for prompt, chosen, _ in pairs]
        for round_ in range(rounds):
            ticks: list[tuple[int, int, str]] = []
            earlier = [tmp_path / str(devices) / str(before) for before in range(round_)]
            out = tmp_path / str(devices) / str(round_)
            taught = Taught(pairs, imitated)
            done.append(factory.refine(taught, round_, earlier, out, lambda *at, to=ticks: to.append(at)))
            # An epoch of six pairs is two steps.
            assert [at[:2] for at in ticks[-4:]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
            assert [path.name for path in out.parent.iterdir()] == [str(each) for each in range(round_ + 1)]
    for one, two in zip(facts[1], facts[2], strict=True):
        assert (one["devices"], two["devices"]) == (1, 2)
        assert one["steps"] == two["steps"] == 2
        assert (one["pairs_a_pass"], two["pairs_a_pass"]) == (2, 1)
        for ours, theirs in zip(one["losses"], two["losses"], strict=True):
            assert theirs["dpo"] == pytest.approx(ours["dpo"], abs=1e-4)
            assert theirs["margin"] == pytest.approx(ours["margin"], abs=1e-3)
    expected, found = (load_file(tmp_path / str(each) / str(rounds - 1) / file) for each in (1, 2))
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, atol=1e-4, rtol=1e-2)


def children() -> set[int]:
    """The processes that descend from this one."""
    found, new = set[int](), {os.getpid()}
    while new:
        listed = [Path(f"/proc/{pid}/task/{pid}/children") for pid in new]
        new = {pid for file in listed for pid in numbers_in(file)} - found
        found |= new
    return found


def numbers_in(file: Path) -> list[int]:
    """Of a file in /proc; none if its process has ended meanwhile."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_a_round_on_devices_that_is_broken_off_leaves_no_process(tiny_writer: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    factory, pairs = learner(tiny_writer, backend="trl", pairs_a_step=2, devices=2, epochs=50)
    before, during = children(), set[int]()

    def stop(*_: object) -> None:
        during.update(children() - before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        factory.refine(Taught(pairs), 0, [], tmp_path / "out", stop)
    assert len(during) >= 3  # torchrun and the two that it started
    assert not [pid for pid in during if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from selfdev.factory.taught import Taught
from test_factory import learner
factory, pairs = learner(Path(sys.argv[2]), backend="trl", pairs_a_step=2, devices=2, epochs=1000)
factory.refine(Taught(pairs), 0, [], Path(sys.argv[3]), lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.proof
def test_processes_end_with_a_run_that_is_killed(tiny_writer: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(Path(__file__).parent),
        str(tiny_writer),
        str(tmp_path / "out"),
    ]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()

    def training() -> list[str]:
        lines = (file.read_bytes().decode() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists())
        return [line for line in lines if str(left) in line]

    for attempt in Retrying(stop=stop_after_delay(60), wait=wait_fixed(0.2), reraise=True):
        with attempt:
            assert not training()
    remove_left(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.proof
def test_what_diverges_on_devices_is_rolled_back(tiny_writer: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    asked = {"backend": "trl", "pairs_a_step": 2, "devices": 2}
    factory, pairs = learner(tiny_writer, **asked, learning_rate=1e30)
    facts = factory.refine(Taught(pairs), 0, [], tmp_path / "out", lambda *_: None)
    assert "lower refinement.learning_rate" in facts["rolled_back"]
    assert not list(tmp_path.iterdir())


def test_what_fails_on_a_device_is_told(tiny_writer: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    asked = {"backend": "trl", "pairs_a_step": 2, "devices": 2}
    factory, [(prompt, chosen, rejected), _] = learner(tiny_writer, **asked)
    unknown = (10**6, *rejected)  # for one of the two
    taught = Taught([(prompt, chosen, unknown), (prompt, chosen, rejected)])
    with pytest.raises(SelfdevError, match=r"a process of the 2 that train has failed: IndexError: .*resume"):
        factory.refine(taught, 0, [], tmp_path / "out", lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_devices_that_do_not_fit_are_refused_before_the_work(tiny_writer: Path) -> None:
    with pytest.raises(ValueError, match=r"4 pairs cannot be shared out evenly among 3.*a multiple of 3"):
        learner(tiny_writer, backend="trl", pairs_a_step=4, devices=3)
    with pytest.raises(ValueError, match=r"refinement\.devices.*set refinement\.backend: trl"):
        learner(tiny_writer, pairs_a_step=4, devices=2)
    for wanted, visible, told in (
        (2, 1, "2 are asked for and 1 GPUs"),
        (1, 4, r"sees 4 GPUs.*devices: 4.*CUDA_VISIBLE"),
    ):
        with pytest.raises(UserError, match=told):
            check_devices(wanted, visible)
    check_devices(4, 4)


def test_without_trl_the_run_ends_before_its_work(tiny_writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # Python then says that there is none
    with pytest.raises(UserError, match=r"pip install 'selfdev\[trl\]'"):
        learner(tiny_writer, backend="trl")


@pytest.mark.parametrize(
    ("reference", "dtype", "moved"),
    [("previous", "float32", False), ("previous", "bfloat16", False), ("first", "float32", True)],
)
def test_one_adapter_that_all_rounds_train(
    reference: str, dtype: str, moved: bool, tiny_writer: Path, tmp_path: Path
) -> None:
    one = {"refit": "continue", "optimizer": "continue", "reference": reference}
    factory, pairs = learner(tiny_writer, **one, learning_rate=1e-3, epochs=1)
    config = factory.config
    factory = LocalFactory(
        config.model_copy(update={"factory": config.factory.model_copy(update={"dtype": dtype})})
    )
    learned: list[Path] = []
    for round_ in range(2):
        out = tmp_path / str(round_)
        facts = factory.refine(Taught(pairs), round_, learned[-1:], out, lambda *_: None)
        learned.append(out)
    assert facts["optimizer"] == "continue"
    assert (abs(facts["losses"][0]["margin"]) > 0.01) == moved  # one step a round, taken from where it begins
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in learned)
    assert {name: each.shape for name, each in first.items()} == {n: each.shape for n, each in second.items()}
    assert not any(torch.equal(second[name], each) for name, each in first.items())
    moments = load_moments(learned[1])
    assert {int(moment) for name, moment in moments.items() if name.endswith(".step")} == {2}
    asked = twenty(factory)[:4]
    written = [factory.write(asked, 2, 1.0, some, lambda *_: None) for some in ([], learned[:1], learned[1:])]
    assert written[0] != written[1] != written[2]


def test_moments_that_are_lost_end_the_session_and_a_round_without_pairs_keeps_them(
    tiny_writer: Path, tmp_path: Path
) -> None:
    one = {"refit": "continue", "optimizer": "continue", "learning_rate": 1e-3, "imitation": {"passes": 1}}
    factory, pairs = learner(tiny_writer, **one)
    imitated = [(prompt, chosen) for prompt, chosen, _ in pairs]
    first, second, third = (tmp_path / name for name in "abc")
    factory.refine(Taught([], imitated), 0, [], first, lambda *_: None)
    assert not load_moments(first)
    factory.refine(Taught(pairs), 1, [first], second, lambda *_: None)
    factory.refine(Taught([], imitated), 2, [second], third, lambda *_: None)
    kept, before = load_moments(third), load_moments(second)
    assert before
    assert all(torch.equal(kept[name], moment) for name, moment in before.items())
    shutil.rmtree(second / "optimizer")
    with pytest.raises(SelfdevError, match="is not there; put it back"):
        factory.refine(Taught(pairs), 2, [second], tmp_path / "d", lambda *_: None)


@pytest.mark.parametrize("reference", ["previous", "first"])
def test_one_adapter_learns_by_trl_what_it_learns_here(
    reference: str, tiny_writer: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed; pip install 'selfdev[trl]'")
    one = {"refit": "continue", "optimizer": "continue", "reference": reference, "learning_rate": 1e-3}
    losses = {}
    for backend in ("own", "trl"):
        factory, pairs = learner(tiny_writer, **one, backend=backend, supervised=0.0, imitation={"passes": 1})
        taught, learned = Taught(pairs, [(prompt, chosen) for prompt, chosen, _ in pairs]), list[Path]()
        for round_ in range(2):
            out = tmp_path / backend / str(round_)
            facts = factory.refine(taught, round_, learned[-1:], out, lambda *_: None)
            learned.append(out)
        losses[backend] = facts["losses"]
        assert not (out / "ref").exists()
    assert losses["own"][0]["margin"] > 0.02  # held to what it was before it imitated
    for ours, theirs in zip(losses["own"], losses["trl"], strict=True):
        assert theirs["dpo"] == pytest.approx(ours["dpo"], abs=1e-3)
        assert theirs["margin"] == pytest.approx(ours["margin"], abs=1e-2)


@pytest.mark.parametrize("refit", ["continue", "fresh"])
def test_a_factory_trained_as_a_whole_is_saved_and_loaded_again(
    refit: str, tiny_writer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    on = refit == "continue"
    more = {"train": "full", "refit": refit, "optimizer": "continue" if on else "fresh"}
    factory, pairs = learner(tiny_writer, **more, learning_rate=1e-3, epochs=1)
    learned: list[Path] = []
    margins, hashes = [], []
    capfd.readouterr()
    for round_ in range(2):
        out = tmp_path / str(round_)
        facts = factory.refine(Taught(pairs), 0, learned, out, lambda *_: None)
        assert facts["train"] == "full"
        assert facts["adapter"] == weights_hash(out)
        assert (out / "optimizer").is_dir() == on
        margins.append(facts["losses"][0]["margin"])
        hashes.append(facts["adapter"])
        learned.append(out)
    assert capfd.readouterr() == ("", "")
    assert margins == pytest.approx([0, 0], abs=1e-3)  # one step a round: each begins at its reference
    assert (hashes[0] == hashes[1]) == (not on)  # afresh, the same pairs give the same weights
    asked = twenty(factory)[:4]
    written = [factory.write(asked, 0, 1.0, some, lambda *_: None) for some in ([], learned[:1], learned)]
    assert written[0] != written[1]
    again, _ = learner(tiny_writer, **more)
    assert again.write(asked, 0, 1.0, learned, lambda *_: None) == written[2]
    whole = load_model(learned[-1]).state_dict()
    own = load_model(tiny_writer).state_dict()
    assert whole.keys() == own.keys()
    assert not any(torch.equal(whole[name], own[name]) for name in own)


def test_a_run_that_trains_all_weights_resumes(tiny_writer: Path, tmp_path: Path) -> None:
    """Stopped after the round, it goes on with what the round has saved."""
    config = writer_config(tiny_writer)
    settings = type(config.refinement)(
        **{**config.refinement.model_dump(), "train": "full", "learning_rate": 1e-3, "refit": "continue"}
    )
    config = config.model_copy(update={"refinement": settings, "controls": ()})
    with pytest.raises(Stopped):
        run(config, tmp_path / "run", watch=Stopping("write", 1))
    resumed = resume(tmp_path / "run")
    [refinement] = resumed.archive.refinements("learning")
    assert refinement.adapter is not None
    learned = resumed.folder / refinement.adapter
    assert refinement.facts["adapter"] == weights_hash(learned)
    factory = LocalFactory(config)
    temperature = config.factory.temperature_at(1)
    texts = {}
    for adapters in ([], [learned]):
        written = factory.write(twenty(factory), 1, temperature, adapters, lambda *_: None)
        texts[len(adapters)] = [sample.tokens for sample in written]
    assert [c.tokens for c in resumed.archive.candidates("learning", 1)] == texts[1] != texts[0]


def test_a_model_that_asks_for_no_sampling_in_earnest_is_saved(tiny_writer: Path, tmp_path: Path) -> None:
    """A generation config that transformers itself does not save; of it the ends are kept."""
    model = load_model(tiny_writer)
    model.generation_config.temperature, model.generation_config.eos_token_id = 0.6, [0, 7]
    save_learned(model, tmp_path / "whole")
    assert load_model(tmp_path / "whole").generation_config.eos_token_id == [0, 7]


def test_a_run_does_not_go_on_with_what_it_has_not_learned(tiny_writer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        run(
            writer_config(tiny_writer).model_copy(update={"controls": ()}), folder, watch=Stopping("write", 1)
        )
    [learned] = (folder / "adapters").iterdir()
    file = learned / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=f"{learned.name}.*by its hash"):
        resume(folder)
    shutil.rmtree(learned)
    with pytest.raises(UserError, match=f"{learned.name}.*is not there"):
        resume(folder)


class Stopped(Exception):
    """Raised in the middle of a run."""


class Stopping(Silent):
    """Ends a run as a phase of some iteration begins."""

    def __init__(self, name: str, iteration: int):
        self.place = name, iteration

    @contextmanager
    def phase(self, name: str, arm: str | None = None, iteration: int | None = None) -> Iterator[Tick]:
        if (name, iteration) == self.place:
            raise Stopped
        with super().phase(name, arm, iteration) as tick:
            yield tick


def test_two_processes_may_make_one_warm_start_at_a_time(tiny_writer: Path, tmp_path: Path) -> None:
    other = tmp_path / ".warm.99999"
    other.mkdir()
    model = with_new_adapter(learner(tiny_writer)[0].model([]), 2, 0)
    save_learned(model, tmp_path / "warm")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".warm.99999", "warm"]
