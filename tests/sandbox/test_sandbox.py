"""The sandbox as its users see it: outcomes, order, chunks, seeds, contexts, mistakes of the caller."""

import threading

import pytest
import torch
from canaries import SUM
from hypothesis import given
from hypothesis import strategies as st

from selfdev.sandbox import Context, Limits, Outcome, Sandbox, SandboxUnavailable, Status
from selfdev.sandbox.job import CHUNK_BYTES, CHUNK_CALLS, Call, chunks

NOISE = "import torch\ndef merge_models(model_dict, device):\n    return torch.rand_like(model_dict['a'])"


def tensor_of(outcome: Outcome) -> torch.Tensor:
    assert outcome.tensor is not None, outcome
    return outcome.tensor


def test_merge_returns_the_sum(any_box: Sandbox) -> None:
    outcome = any_box.merge(SUM, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 20.0])})
    assert outcome.status is Status.OK
    assert tensor_of(outcome).tolist() == [11.0, 22.0]
    assert (outcome.failure, outcome.error) == ("", "")
    assert outcome.seconds > 0


def test_the_statuses_are_a_closed_list() -> None:
    assert {str(status) for status in Status} == {
        *("ok", "rejected", "error", "timeout", "memory", "crashed", "bad_output")
    }


def test_an_error_names_class_message_and_line(any_box: Sandbox) -> None:
    source = "def merge_models(model_dict, device):\n    x = 1\n    raise ValueError('no good')"
    outcome = any_box.merge(source, {"a": torch.ones(2)})
    assert (outcome.status, outcome.failure, outcome.error) == ("error", "ValueError", "no good (line 3)")


SHAPES = [(), (1,), (0,), (3, 0), (2, 3, 4), (1, 1, 1, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_travels_alone(box: Sandbox, shape: tuple[int, ...]) -> None:
    a = torch.randn(shape)
    assert torch.equal(tensor_of(box.merge(SUM, {"a": a, "b": a})), a + a)


def test_every_shape_travels_in_company(any_box: Sandbox) -> None:
    tensors = [torch.randn(shape) for shape in SHAPES]
    outcomes = any_box.merge_many(SUM, [{"a": a, "b": a} for a in tensors])
    for outcome, a in zip(outcomes, tensors, strict=True):
        assert torch.equal(tensor_of(outcome), a + a)


def test_strided_and_grad_inputs_travel(box: Sandbox) -> None:
    a = torch.randn(4, 6)[:, ::2].T
    b = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(tensor_of(box.merge(SUM, {"a": a, "b": b})), (a + b).detach())


def test_expert_names_and_their_order_travel(box: Sandbox) -> None:
    names = ["z", "a/b", "ünïcode", "", "quote'\"", "\n"]
    source = (
        "import torch\ndef merge_models(model_dict, device):\n"
        f"    assert list(model_dict) == {names!r}\n    return list(model_dict.values())[0]"
    )
    assert box.merge(source, {name: torch.ones(1) for name in names}).ok


def test_merge_many_keeps_the_order_and_the_shapes(any_box: Sandbox) -> None:
    calls = [{"a": torch.full((i % 5 + 1, 3), float(i))} for i in range(CHUNK_CALLS + 9)]
    outcomes = any_box.merge_many(SUM, calls)
    assert all(
        torch.equal(tensor_of(outcome), call["a"]) for outcome, call in zip(outcomes, calls, strict=True)
    )


def test_no_calls_give_no_outcomes(box: Sandbox) -> None:
    assert box.merge_many(SUM, []) == []


def test_workers_change_nothing_but_the_time() -> None:
    # A program that remembers what it has seen in its process shows which calls shared a child.
    source = (
        "import torch\ntorch.seen = getattr(torch, 'seen', 0) + 1\n"
        "def merge_models(model_dict, device):\n    return torch.rand_like(model_dict['a']) + torch.seen"
    )
    calls = [{"a": torch.zeros(4)} for _ in range(3 * CHUNK_CALLS)]
    seeds = list(range(len(calls)))

    def merged(workers: int) -> list[list[float]]:
        with Sandbox(workers=workers) as own:
            return [tensor_of(outcome).tolist() for outcome in own.merge_many(source, calls, seeds=seeds)]

    one, two, three = map(merged, (1, 2, 3))
    assert one == two == three
    assert [int(values[0]) for values in one] == [i % CHUNK_CALLS + 1 for i in range(len(calls))]


@given(st.lists(st.integers(0, CHUNK_BYTES // 4), max_size=80))
def test_chunks_cover_all_calls_in_order_and_stay_small(sizes: list[int]) -> None:
    calls = [Call({"a": torch.empty(1).expand(size)}) for size in sizes]
    parts = list(chunks(calls))
    assert [i for part in parts for i in part] == list(range(len(calls)))
    for part in parts:
        assert 1 <= len(part) <= CHUNK_CALLS
        assert len(part) == 1 or sum(calls[i].nbytes for i in part) <= CHUNK_BYTES


def test_small_calls_share_one_child() -> None:
    assert len(list(chunks([Call({"a": torch.ones(64, 64)})] * 30))) == 1


def test_a_seed_decides_whatever_comes_before_it(box: Sandbox) -> None:
    call = {"a": torch.zeros(5)}
    alone = tensor_of(box.merge(NOISE, call, seed=3))
    together = box.merge_many(NOISE, [call] * 4, seeds=[1, 3, 2, 3])
    assert torch.equal(alone, tensor_of(together[1]))
    assert torch.equal(alone, tensor_of(together[3]))
    assert not torch.equal(alone, tensor_of(together[0]))


def test_the_callers_generator_is_left_alone(box: Sandbox) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    box.merge(NOISE, {"a": torch.zeros(3)}, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_a_programs_own_state_does_not_pass_from_call_to_call(any_box: Sandbox) -> None:
    source = (
        "import torch\nseen = []\ndef merge_models(model_dict, device, cache={}):\n"
        "    seen.append(1); cache[len(cache)] = 1\n"
        "    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)\n"
        "    ok = len(seen) == len(cache) == 1\n    return model_dict['a'] + ok"
    )
    for outcome in any_box.merge_many(source, [{"a": torch.zeros(2)}] * 3):
        assert tensor_of(outcome).tolist() == [1.0, 1.0]
    source = (
        "import torch\ndef merge_models(model_dict, device):\n"
        "    fresh = torch.get_default_dtype() == torch.float32\n"
        "    ok = fresh and torch.is_grad_enabled()\n    torch.set_default_dtype(torch.float64)\n"
        "    torch.set_grad_enabled(False)\n    return model_dict['a'] + ok"
    )
    for outcome in any_box.merge_many(source, [{"a": torch.zeros(2)}] * 3):
        assert tensor_of(outcome).tolist() == [1.0, 1.0]


def test_sets_of_strings_have_one_order_in_every_sandbox(
    box: Sandbox, narrow_box: Sandbox, plain_box: Sandbox
) -> None:
    source = (
        "import torch\ndef merge_models(model_dict, device):\n    order = list({str(i) for i in range(50)})\n"
        "    return torch.tensor([float(name) for name in order])"
    )
    call = {"a": torch.zeros(50)}
    one, other, plain = (tensor_of(each.merge(source, call)) for each in (box, narrow_box, plain_box))
    assert torch.equal(one, other)
    assert torch.equal(one, plain)


CONTEXT = Context(seed=torch.tensor([5.0, 6.0]), name="layers.2.mlp.up", layer=2, layers=4)


@pytest.mark.parametrize(
    ("signature", "value"),
    [
        ("model_dict, device, context", "context.seed + context.layer / context.layers"),
        ("m, d, c", "c.seed + len(c.name) / 30"),
        ("model_dict, device, context=None", "context.seed + context.layer / context.layers"),
        ("model_dict, device, density=0.5", "model_dict['a'] * 0 + 5.5 + 0 * density + (0, 1)[0]"),
    ],
)
def test_a_third_parameter_gets_the_context(box: Sandbox, signature: str, value: str) -> None:
    source = f"def merge_models({signature}):\n    return {value}"
    outcome = box.merge(source, {"a": torch.zeros(2)}, context=CONTEXT)
    assert tensor_of(outcome)[0] == 5.5


def test_contexts_belong_to_their_calls(any_box: Sandbox) -> None:
    source = "def merge_models(model_dict, device, context):\n    return context.seed"
    contexts = [Context(torch.full((2,), float(i))) for i in range(5)]
    outcomes = any_box.merge_many(source, [{"a": torch.zeros(2)}] * 5, contexts=contexts)
    assert [tensor_of(outcome)[0].item() for outcome in outcomes] == [0, 1, 2, 3, 4]


MISTAKES = [
    ({}, {}, "empty"),
    ({"a": torch.ones(2), "b": torch.ones(3)}, {}, "b: shape"),
    ({"a": torch.ones(2, dtype=torch.float64)}, {}, "float32"),
    ({"a": torch.ones(2)}, {"seed": -1}, "seed is -1"),
    ({"a": torch.ones(2)}, {"seed": 1.5}, "seed is 1.5"),
    ({("a", 1): torch.ones(2)}, {}, "is not a string"),
    ({"a": torch.ones(2)}, {"context": Context(torch.ones(2), name=b"x")}, "not b'x'"),  # type: ignore[arg-type]
    ({"a": torch.ones(2)}, {"context": Context(torch.ones(3))}, "context's seed: shape"),
]


@pytest.mark.parametrize(("model_dict", "options", "message"), MISTAKES)
def test_a_callers_mistake_is_a_value_error(
    box: Sandbox, model_dict: dict[str, torch.Tensor], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        box.merge(SUM, model_dict, **options)  # type: ignore[arg-type]


def test_lengths_must_agree(box: Sandbox) -> None:
    with pytest.raises(ValueError, match="1 model_dicts, 1 contexts and 2 seeds"):
        box.merge_many(SUM, [{"a": torch.ones(1)}], seeds=[1, 2])


@pytest.mark.parametrize("name", ["wall_seconds", "cpu_seconds", "memory_bytes", "source_bytes"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})


def test_a_sandbox_that_was_not_entered_says_so() -> None:
    with pytest.raises(SandboxUnavailable, match="with Sandbox"):
        Sandbox().merge(SUM, {"a": torch.ones(1)})


def test_threads_take_turns(box: Sandbox) -> None:
    sums: dict[int, float] = {}

    def work(i: int) -> None:
        for _ in range(3):
            sums[i] = tensor_of(box.merge(SUM, {"a": torch.tensor([float(i)])})).item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == {i: float(i) for i in range(4)}
