import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from selfdev.errors import SelfdevError, UserError
from selfdev.factory import memory
from selfdev.factory.imitation import Lesson
from selfdev.factory.memory import (
    SHARE,
    TRANSIENT,
    Footprint,
    available,
    check_batch,
    fitting_pairs,
    fitting_pass,
    footprint,
    footprint_of_trl,
)
from selfdev.factory.packing import Model, completion_states
from selfdev.factory.refinement import Step
from selfdev.factory.vocabulary import CHUNK
from selfdev.settings import RefinementSettings
from tiny import tiny_model

STEP = Step(tuple(range(40)), (tuple(range(20)), tuple(range(30)), tuple(range(10))), ((0, 1), (2, 1)))
"""A prompt of 40 tokens and 60 more; the longest program takes 70 with its prompt."""


def adapted(rank: int = 4) -> PeftModel:
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), lora)


def kept(model: Model, tokens: int) -> int:
    """Bytes that a pass really keeps, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        completion_states(model, [1] * 10, [[1] * (tokens - 10)])
    return sum(storages.values())


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_estimate_from_a_short_pass_holds_for_long_ones(train: str) -> None:
    model = adapted() if train == "lora" else tiny_model()
    needs = footprint(model, kl=False)
    assert needs.of(250) - needs.fixed == pytest.approx(TRANSIENT * kept(model, 250), rel=0.05)


def test_what_is_fixed_grows_with_the_rank_and_with_a_kl_term() -> None:
    trained = sum(p.numel() * 4 for p in adapted(8).parameters() if p.requires_grad)
    assert footprint(adapted(8), kl=False).fixed - footprint(adapted(4), kl=False).fixed == 3 * trained / 2
    assert footprint(adapted(), kl=True).fixed > footprint(adapted(), kl=False).fixed
    whole = tiny_model()
    weights = sum(p.numel() * 4 for p in whole.parameters())
    logits = CHUNK * 64 * 4 * 2  # of 64 tokens of the vocabulary, and their softmax
    assert footprint(whole, kl=False).fixed == 3 * weights + logits


def test_the_tokens_of_so_many_bytes() -> None:
    needs = Footprint(fixed=1000, a_token=50.0)
    assert needs.of(100) == 6000
    for free in (1060, 5000, 123_456):
        tokens = needs.tokens(free)
        assert needs.of(tokens) <= free < needs.of(tokens + 1)
    assert needs.tokens(1000) == 0


def test_enough_memory_changes_nothing() -> None:
    assert fitting_pass(adapted(), [STEP], RefinementSettings(), free=10**12) is None
    assert fitting_pass(adapted(), [STEP], RefinementSettings(tokens_a_pass=80), free=10**12) == 80
    assert fitting_pass(adapted(), [STEP], RefinementSettings(tokens_a_pass=10), free=10**12) == 10
    assert fitting_pass(adapted(), [STEP], RefinementSettings(), free=None) is None


def test_the_longest_of_preferences_and_imitation_counts() -> None:
    model, settings = adapted(), RefinementSettings()
    lesson = Lesson(tuple(range(1, 40)), (tuple(range(1, 60)),) * 9)
    needs = footprint(model, kl=False).of(len(STEP.prompt) + sum(STEP.lengths))
    assert fitting_pass(model, [STEP], settings, free=int(needs / SHARE) + 1) is None
    alone = fitting_pass(model, [STEP, lesson], settings, free=int(needs / SHARE) + 1)
    assert alone is not None
    assert alone < len(lesson.prompt) + sum(lesson.lengths)


def test_little_memory_makes_smaller_passes_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    free = int(footprint(model, kl=False).of(80) / 0.9) + 10
    with caplog.at_level(logging.WARNING):
        assert fitting_pass(model, [STEP], RefinementSettings(), free) == 80
    assert "passes of at most 80 tokens instead" in caplog.text


def test_too_little_for_one_program_ends_before_the_work() -> None:
    model = adapted()
    free = footprint(model, kl=False).of(69)
    with pytest.raises(
        SelfdevError, match=r"one program of 70 tokens.*free some, or take a lower refinement\.rank"
    ):
        fitting_pass(model, [STEP], RefinementSettings(), free)
    with pytest.raises(SelfdevError, match=r"set refinement\.train: lora"):
        fitting_pass(tiny_model(), [STEP], RefinementSettings(train="full"), free=1000)


def test_pairs_of_trl_are_split_evenly_where_memory_is_short() -> None:
    model = adapted()
    pair = 2 * 70  # two rows, as long as the longest
    settings = RefinementSettings(pairs_a_step=6)
    assert fitting_pairs(model, [STEP], 12, settings, None, False) == 6
    assert fitting_pairs(model, [STEP], 12, settings, 10**12, False) == 6
    needs = footprint_of_trl(model)
    for fits, expected in ((5, 3), (3, 3), (2, 2), (1, 1)):
        free = int(needs.of(fits * pair) / SHARE) + 10
        assert fitting_pairs(model, [STEP], 12, settings, free, False) == expected
    few = int(needs.of(pair) / SHARE) + 10
    with pytest.raises(SelfdevError, match=r"one pair of 140 tokens.*refinement\.backend: own"):
        fitting_pairs(model, [STEP], 12, settings, few - 1000, False)
    with pytest.raises(SelfdevError, match=r"one pair of 140 tokens"):  # a second model has no room
        fitting_pairs(model, [STEP], 12, settings, few, True)
    limited = RefinementSettings(pairs_a_step=6, tokens_a_pass=300)
    assert fitting_pairs(model, [STEP], 12, limited, None, False) == 2


def test_passes_of_trl_share_out_the_last_step_evenly_too() -> None:
    model, settings = adapted(), RefinementSettings(pairs_a_step=6)
    assert [fitting_pairs(model, [STEP], 12 + rest, settings, None, False) for rest in range(6)] == [
        6,
        1,
        2,
        3,
        2,
        1,
    ]
    two = RefinementSettings(backend="trl", pairs_a_step=4, devices=2)
    # Of 5 pairs one cannot be shared; of 7 the last two are one for each device.
    assert [fitting_pairs(model, [STEP], pairs, two, None, False) for pairs in (4, 5, 6, 7, 8)] == [
        2,
        2,
        1,
        1,
        2,
    ]


def test_trl_keeps_of_a_layer_its_input_alone() -> None:
    """What one more layer costs: a token's hidden state in float32, but for the one that is made anew at a time."""
    shallow, deep = (
        get_peft_model(tiny_model(layers=layers), LoraConfig(r=4, target_modules="all-linear"))
        for layers in (4, 12)
    )
    width = shallow.config.hidden_size
    found = [footprint_of_trl(model).a_token for model in (shallow, deep)]
    assert found[1] - found[0] == pytest.approx(8 * 4 * width, rel=0.1)
    assert found[0] < footprint(shallow, False).a_token
    assert not shallow.get_base_model().training
    assert not shallow.get_base_model().is_gradient_checkpointing


def test_a_model_without_checkpointing_keeps_all_of_its_layers() -> None:
    shallow, deep = tiny_model(layers=4), tiny_model(layers=12)
    kept = [footprint_of_trl(model).a_token for model in (shallow, deep)]
    shallow.supports_gradient_checkpointing = deep.supports_gradient_checkpointing = False
    plain = [footprint_of_trl(model).a_token for model in (shallow, deep)]
    assert plain[1] - plain[0] > 4 * (kept[1] - kept[0])


def test_processes_of_a_cpu_share_its_memory() -> None:
    model, pair = adapted(), 2 * 70
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needs = footprint_of_trl(model)
    settings = RefinementSettings(backend="trl", pairs_a_step=4, devices=2)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    one = int((needs.of(pair) + trained) / SHARE) + 10 + weights
    assert fitting_pairs(model, [STEP], 4, settings, 2 * one - weights, False) == 1
    with pytest.raises(SelfdevError, match="for each of the devices"):
        fitting_pairs(model, [STEP], 4, settings, 2 * one - weights - 2000, False)


def test_what_is_available_is_bounded_by_the_machine() -> None:
    free = available(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not say how much memory is free")
    with open("/proc/meminfo") as lines:
        total = int(lines.readline().split()[1]) * 1024
    assert 0 < free < total


def test_what_a_control_group_leaves_counts_what_files_give_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that has read its weights through the system's cache."""
    own = tmp_path / "groups" / "slice" / "box"
    own.mkdir(parents=True)
    (tmp_path / "group").write_text("0::/slice/box\n")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "group")
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path / "groups")
    (own / "memory.max").write_text("10000000\n")
    (own / "memory.current").write_text("9000000\n")
    assert available(torch.device("cpu")) == 1_000_000
    (own / "memory.stat").write_text("anon 1000000\ninactive_file 7000000\nactive_file 500000\n")
    assert available(torch.device("cpu")) == 8_000_000
    (own.parent / "memory.max").write_text("max\n")
    (own.parent / "memory.current").write_text("9500000\n")
    assert available(torch.device("cpu")) == 8_000_000


def test_what_is_available_on_a_gpu_is_what_it_and_torchs_cache_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has none."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    assert available(torch.device("cuda")) == 1000 + 200


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_sampled() -> None:
    model = tiny_model()
    # Two layers, keys and values, two heads of 8 numbers: 256 bytes a token. Three copies of 64 logits a row.
    needs = (50 + 30) * 256 + 10 * (100 * 256 + 3 * 64 * 4)
    check_batch(model, [50, 30], 10, 100, None)
    check_batch(model, [50, 30], 10, 100, int(needs / SHARE) + 1)
    with pytest.raises(UserError, match=r"10 programs.* up to 100 tokens.*set factory\.batch to 9 or less"):
        check_batch(model, [50, 30], 10, 100, int(needs / SHARE) - 1)
    turn = int((needs + 10 * 40 * 256) / SHARE)  # each has 40 tokens of a prompt for itself
    check_batch(model, [50, 30], 10, 100, turn + 1, own=40)
    with pytest.raises(UserError, match="10 programs"):
        check_batch(model, [50, 30], 10, 100, turn - 1, own=40)
    with pytest.raises(UserError, match=r"a smaller factory\.max_new_tokens, or a smaller factory\.model"):
        check_batch(model, [50, 30], 10, 100, 1000)
