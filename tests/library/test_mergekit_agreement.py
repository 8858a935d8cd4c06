"""Our methods against those of mergekit 0.1.5, called as its users call them: same parameters, float32, to 1e-5."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from selfdev.algorithms.library import method
from selfdev.errors import UserError

mergekit = pytest.importorskip(
    "mergekit.merge_methods", reason="mergekit is not installed; `pip install -e '.[dev]'` brings it"
)

MERGEKIT = {"reading": "mergekit"}
TOLERANCE = 1e-5
THREE = [0.2, 0.7, 1.3]


@dataclass(frozen=True)
class Case:
    """One method under its two names, with the same parameters in the words of both."""

    ours: str
    parameters: dict[str, Any]
    theirs: str
    options: dict[str, Any] = field(default_factory=dict)
    experts: int = 3
    base: str = "seed"
    """What mergekit gets as the base model: the seed, the first expert, or none."""

    def __str__(self) -> str:
        flags = "-".join(f"{name}={value}" for name, value in self.parameters.items()).replace(" ", "")
        return f"{self.ours}-{self.experts}-{flags}"


CASES = [
    Case("linear", {}, "linear", {"weight": 1.0}, base="none"),
    Case("linear", {"weights": THREE}, "linear", {"weight": THREE}, base="none"),
    Case(
        "linear",
        {"weights": THREE, "normalize": False},
        "linear",
        {"weight": THREE, "normalize": False},
        base="none",
    ),
    Case("task_arithmetic", {"scale": 0.3}, "task_arithmetic", {"weight": 1.0, "lambda": 0.3}),
    Case("weighted_task_arithmetic", {"weights": THREE}, "task_arithmetic", {"weight": THREE}),
    Case("ties", {"density": 0.3}, "ties", {"weight": 1.0, "density": 0.3}),
    Case(
        "ties",
        {"density": 0.3, "scale": 1.5, **MERGEKIT},
        "ties",
        {"weight": 0.5, "density": 0.3, "lambda": 1.5},
    ),
    Case(
        "ties",
        {"density": [0.3, 0.5, 1.0], "weights": THREE, **MERGEKIT},
        "ties",
        {"weight": THREE, "density": [0.3, 0.5, 1.0]},
    ),
    Case(
        "ties",
        {"density": 0.01, "weights": THREE, "normalize": False, **MERGEKIT},
        "ties",
        {"weight": THREE, "density": 0.01, "normalize": False},
    ),
    Case("ties", {"density": 1.0, "weights": THREE, **MERGEKIT}, "ties", {"weight": THREE, "density": 1.0}),
    Case(
        "ties",
        {"density": 0.4, "normalize": False},
        "ties",
        {"weight": 1.0, "density": 0.4, "normalize": False},
    ),
    *(
        Case(
            f"dare_{kind}",
            {
                "density": density,
                "scale": 0.7,
                "seed": 5,
                "weights": THREE,
                "normalize": normalize,
                **MERGEKIT,
            },
            f"dare_{kind}",
            {"weight": THREE, "density": density, "lambda": 0.7, "normalize": normalize},
        )
        for kind in ("linear", "ties")
        for density, normalize in ((0.5, False), (0.1, True), ([1.0, 0.5, 0.9], False))
    ),
    Case(
        "dare_linear", {"seed": 5, "scale": 1.0, **MERGEKIT}, "dare_linear", {"weight": 1.0, "density": 0.5}
    ),
    Case("dare_ties", {"seed": 5, **MERGEKIT}, "dare_ties", {"weight": 1.0, "density": 0.5}),
    Case(
        "della",
        {"density": 0.5, "epsilon": 0.2, "seed": 5, "weights": THREE, **MERGEKIT},
        "della",
        {"weight": THREE, "density": 0.5, "epsilon": 0.2},
    ),
    Case(
        "della",
        {"density": [0.5, 1.0, 0.6], "epsilon": [0.2, 0.1, 0.3], "elect": False, "seed": 5, **MERGEKIT},
        "della_linear",
        {"weight": 1.0, "density": [0.5, 1.0, 0.6], "epsilon": [0.2, 0.1, 0.3]},
    ),
    *(
        Case(
            "breadcrumbs",
            {
                "density": density,
                "outliers": outliers,
                "weights": THREE,
                "elect": elect,
                "scale": 1.0,
                **MERGEKIT,
            },
            "breadcrumbs_ties" if elect else "breadcrumbs",
            {"weight": THREE, "density": density, "gamma": outliers},
        )
        for elect in (False, True)
        for density, outliers in ((0.5, 0.1), (0.9, 0.2), (1.0, 0.1), (0.001, 0.0))
    ),
    Case(
        "breadcrumbs",
        {"density": 0.5, "outliers": 0.1, "scale": 0.3},
        "breadcrumbs",
        {"weight": 1.0, "density": 0.5, "gamma": 0.1, "lambda": 0.3},
    ),
    *(
        Case(
            name,
            {"density": 0.4, "seed": 5, "rescale": False, "scale": 1.0, **MERGEKIT},
            name,
            {"weight": 1.0, "density": 0.4, "rescale": False},
        )
        for name in ("dare_linear", "dare_ties")
    ),
    Case(
        "della",
        {"density": 0.5, "epsilon": 0.2, "seed": 5, "rescale": False, **MERGEKIT},
        "della",
        {"weight": 1.0, "density": 0.5, "epsilon": 0.2, "rescale": False},
    ),
    Case(
        "ties",
        {"density": 0.3, "rescale": True, "weights": THREE, **MERGEKIT},
        "ties",
        {"weight": THREE, "density": 0.3, "rescale": True},
    ),
    Case("ties", {"density": 0.3, "rescale": True}, "ties", {"weight": 1.0, "density": 0.3, "rescale": True}),
    Case(
        "breadcrumbs",
        {"density": 0.5, "outliers": 0.1, "rescale": True, "scale": 1.0, **MERGEKIT},
        "breadcrumbs",
        {"weight": 1.0, "density": 0.5, "gamma": 0.1, "rescale": True},
    ),
    Case("model_stock", MERGEKIT, "model_stock"),
    Case("model_stock", MERGEKIT, "model_stock", experts=2),
    Case("model_stock", {"filter_wise": True, **MERGEKIT}, "model_stock", {"filter_wise": True}),
    *(
        Case("slerp", {"t": t, **MERGEKIT}, "slerp", {"t": t}, experts=2, base="first")
        for t in (0.0, 0.3, 0.5, 1.0)
    ),
    *(
        Case("nuslerp", {"t": t, **MERGEKIT}, "nuslerp", {"weight": [1.0 - t, t]}, experts=2)
        for t in (0.0, 0.3, 0.5, 1.0)
    ),
    *(
        Case(
            "nuslerp",
            {"t": 0.3, "flatten": False, "row_wise": row_wise, **MERGEKIT},
            "nuslerp",
            {"weight": [0.7, 0.3], "nuslerp_flatten": False, "nuslerp_row_wise": row_wise},
            experts=2,
        )
        for row_wise in (False, True)
    ),
    Case("karcher", MERGEKIT, "karcher", base="none"),
    Case("karcher", MERGEKIT, "karcher", base="none", experts=1),
    Case("multislerp", MERGEKIT, "multislerp", {"weight": 1.0}),
    Case("multislerp", {"weights": THREE, **MERGEKIT}, "multislerp", {"weight": THREE}),
    Case(
        "multislerp",
        {"weights": THREE, "normalize": False, **MERGEKIT},
        "multislerp",
        {"weight": THREE, "normalize_weights": False},
    ),
    *(
        Case("sce", {"density": density, **MERGEKIT}, "sce", {"select_topk": density})
        for density in (0.1, 0.5, 1.0, 0.0001)
    ),
    Case("sce", {"density": 0.5, **MERGEKIT}, "sce", {"select_topk": 0.5}, experts=1),
    Case("nearswap", {"t": 0.01}, "nearswap", {"t": 0.01}, experts=1),
    Case("nearswap", {"t": 2e-7, **MERGEKIT}, "nearswap", {"t": 2e-7}, experts=1),
    Case("arcee_fusion", {}, "arcee_fusion", experts=1),
    Case("ram", {"threshold": 0.01}, "ram", {"epsilon": 0.01}),
    Case("ram", {}, "ram"),
]


def stack(kind: str, experts: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A seed's tensor and task vectors, such that seed plus task vector is exact where entries are to be equal."""
    generator = torch.Generator().manual_seed(len(kind) + experts)
    seed = torch.randn(shape, generator=generator)
    vectors = torch.randn(experts, *shape, generator=generator)
    if kind == "related":
        vectors = (vectors + 2.0 * torch.randn(shape, generator=generator)) * 0.01
    elif kind == "opposed":
        vectors[-1] = vectors[-1] - vectors[0]
    elif kind == "sparse":
        vectors = vectors * (torch.rand(vectors.shape, generator=generator) < 0.3)
    elif kind == "equal magnitudes":
        # Few values, on a grid: many entries stand at every threshold, and many votes cancel.
        seed, vectors = (seed * 8).round() / 8, (vectors * 2).round() / 2
    elif kind == "tiny":
        seed, vectors = torch.zeros(shape), vectors * 2e-4
    elif kind == "one is zero":
        vectors[0] = 0.0
    # What both sides see is expert minus seed, rounded.
    return seed, (seed + vectors) - seed


def merged_by_mergekit(case: Case, seed: Tensor, vectors: Tensor) -> Tensor:
    """What mergekit makes of the experts, minus the seed."""
    experts = [seed + vector for vector in vectors]
    options = dict(case.options)
    tensors = [seed, *experts] if case.base == "seed" else experts
    for name, value in options.items():
        if isinstance(value, list):  # by the experts' places among the inputs
            options[name] = dict(enumerate(value, start=len(tensors) - len(value)))
    torch.manual_seed(case.parameters.get("seed", 0))
    base = None if case.base == "none" else 0
    merged: Tensor = mergekit.merge_tensors(tensors, case.theirs, parameters=options, base_index=base)
    return merged - seed


KINDS = ["unrelated", "related", "opposed", "sparse", "equal magnitudes", "tiny", "one is zero"]
# They add up whole tensors, mergekit in float32.
ANGLES = ["slerp", "nuslerp", "karcher", "multislerp", "model_stock"]
# Keep all of equal magnitudes at the threshold, unless they read as mergekit does.
TRIMMING = {"ties", "breadcrumbs"}
SHAPES = {"unrelated": [(40, 30), (7,), (5, 4, 3), (6, 1)]}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_mergekit(kind, case):
    for shape in SHAPES.get(kind, [(40, 30), (7,)]):
        if shape[1:] == (1,) and case.ours == "della":
            continue  # a row of one entry has no ranks: mergekit divides zero by zero and fails
        if kind == "equal magnitudes" and case.ours in TRIMMING and "reading" not in case.parameters:
            continue  # where the readings part
        seed, vectors = stack(kind, case.experts, shape)
        ours = method(case.ours).merge(vectors, seed, **case.parameters)
        theirs = merged_by_mergekit(case, seed, vectors)
        size = vectors.abs().max().item()
        # 1e-5 of the task vectors, small ones too, as far as their sum with the seed shows it in float32.
        visible = 4 * torch.finfo(torch.float32).eps * (seed.abs().max().item() + size)
        assert (ours - theirs).abs().max().item() <= max(TOLERANCE * size, visible), f"shape {shape}"


@pytest.mark.parametrize("case", [case for case in CASES if "reading" in case.parameters], ids=str)
def test_agrees_on_a_matrix_of_bfloat16_weights(case):
    """Differences of bfloat16 weights lie on a grid: thousands of entries share the threshold's magnitude."""
    seed, vectors = stack("related", case.experts, (200, 300))
    seed, experts = seed.bfloat16().float(), (seed + vectors).bfloat16().float()
    ours = method(case.ours).merge(experts - seed, seed, **case.parameters)
    theirs = merged_by_mergekit(case, seed, experts - seed)
    assert (ours - theirs).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("name", ANGLES)
def test_angles_of_large_tensors_are_those_of_mergekit_in_float64(name):
    """In float32 mergekit's own sums over many entries are off by more than 1e-5."""
    case = next(case for case in CASES if case.ours == name)
    seed, vectors = stack("unrelated", case.experts, (500, 600))
    ours = method(name).merge(vectors, seed, **case.parameters)
    theirs = merged_by_mergekit(case, seed.double(), vectors.double())
    assert (ours - theirs).abs().max().item() <= 3e-6


@pytest.mark.parametrize("case", [case for case in CASES if case.ours in ANGLES], ids=str)
def test_angles_agree_on_weights_of_a_checkpoints_size(case):
    """Entries around 0.05, fine-tuned by 0.003: what mergekit's sums in float32 are off by stays below 1e-5 here."""
    generator = torch.Generator().manual_seed(case.experts)
    seed = 0.05 * torch.randn(576, 1536, generator=generator)
    vectors = torch.randn(case.experts, 576, 1536, generator=generator)
    vectors = 0.003 * (vectors + torch.randn(576, 1536, generator=generator))
    experts = seed + vectors
    ours = method(case.ours).merge(experts - seed, seed, **case.parameters)
    assert (ours - merged_by_mergekit(case, seed, experts - seed)).abs().max().item() <= TOLERANCE


# Where the readings part, by numbers worked by hand: (method, parameters, experts, the paper's, mergekit's).
PARTINGS = {
    "ties divides by the weights": (
        Case("ties", {"density": 1.0, "weights": [0.5, 1.0]}, "ties", {"weight": [0.5, 1.0], "density": 1.0}),
        [[4.0, -2.0], [2.0, 4.0]],
        [(2.0 + 2.0) / 2, 4.0],
        [(2.0 + 2.0) / 1.5, 4.0],
    ),
    "ties elects the positive sign where votes cancel": (
        Case("ties", {"density": 1.0}, "ties", {"weight": 1.0, "density": 1.0}),
        [[3.0, 1.0], [-3.0, 1.0]],
        [0.0, 1.0],
        [3.0, 1.0],
    ),
    "dare_ties adds": (
        Case("dare_ties", {"density": 1.0}, "dare_ties", {"weight": 1.0, "density": 1.0}),
        [[4.0, -2.0], [2.0, 4.0]],
        [3.0, 4.0],
        [6.0, 4.0],
    ),
    "breadcrumbs holds to the density": (
        Case(
            "breadcrumbs",
            {"density": 0.75, "outliers": 0.5, "scale": 1.0},
            "breadcrumbs",
            {"weight": 1.0, "density": 0.75, "gamma": 0.5},
        ),
        [[1.0, -2.0, 3.0, -4.0]],
        [1.0, -2.0, 0.0, 0.0],
        [1.0, -2.0, 3.0, 0.0],
    ),
    "breadcrumbs at density 1 keeps outliers": (
        Case(
            "breadcrumbs",
            {"density": 1.0, "outliers": 0.5, "scale": 1.0},
            "breadcrumbs",
            {"weight": 1.0, "density": 1.0, "gamma": 0.5},
        ),
        [[1.0, -2.0, 3.0, -4.0]],
        [1.0, -2.0, 0.0, 0.0],
        [1.0, -2.0, 3.0, -4.0],
    ),
    "model_stock goes away from the mean": (
        # Cosine -0.6: t = 2 * -0.6 / (1 - 0.6) = -3 times the mean (0.2, 0.4).
        Case("model_stock", {}, "model_stock"),
        [[1.0, 0.0], [-0.6, 0.8]],
        [0.0, 0.0],
        [-0.6, -1.2],
    ),
    "sce weighs equally where mean squares are tiny": (
        # Energies 9 and 1 parts: (27 + 1) / 10 against (3 + 1) / 2, times 1e-4.
        Case("sce", {"density": 1.0}, "sce", {"select_topk": 1.0}),
        [[3e-4, 0.0], [1e-4, 0.0]],
        [2.8e-4, 0.0],
        [2e-4, 0.0],
    ),
    "sce selects nothing of one expert": (
        Case("sce", {"density": 0.5}, "sce", {"select_topk": 0.5}),
        [[1.0, 2.0]],
        [1.0, 2.0],
        [0.0, 0.0],
    ),
    "nearswap shrinks the least differences": (
        Case("nearswap", {"t": 2.5e-7}, "nearswap", {"t": 2.5e-7}),
        [[2e-7, 1.0]],
        [2e-7, 2.5e-7],
        [0.5e-7, 2.5e-7],
    ),
    "nuslerp takes a zero task vector to be at a right angle": (
        Case("nuslerp", {"t": 0.5}, "nuslerp", {"weight": 1.0}),
        [[0.0, 0.0], [2.0, 0.0]],
        [1.0, 0.0],
        [2.0 * 0.5**0.5, 0.0],
    ),
    "slerp is linear where experts are near": (
        # At 0.01 radians from the middle, on either side: a line loses 0.01^2 / 2 of the length there.
        Case("slerp", {"t": 0.5}, "slerp", {"t": 0.5}, base="first"),
        [[0.99995, 0.0099998333], [0.99995, -0.0099998333]],
        [1.0, 0.0],
        [0.99995, 0.0],
    ),
    "karcher counts a zero tensor in the mean norm": (
        Case("karcher", {}, "karcher", base="none"),
        [[3.0, 0.0], [0.0, 0.0]],
        [3.0, 0.0],
        [1.5, 0.0],
    ),
    "multislerp goes to the mean of the directions": (
        # Weights 2 and 1 at a right angle: 30 degrees against the direction (2, 1).
        Case("multislerp", {"weights": [2.0, 1.0]}, "multislerp", {"weight": [2.0, 1.0]}),
        [[1.0, 0.0], [0.0, 1.0]],
        [3**0.5 / 2, 0.5],
        [2 / 5**0.5, 1 / 5**0.5],
    ),
}


@pytest.mark.parametrize(("case", "experts", "paper", "theirs"), PARTINGS.values(), ids=PARTINGS)
def test_where_the_readings_part(case, experts, paper, theirs):
    vectors = torch.tensor(experts)
    seed = torch.zeros(vectors.shape[1:])

    def check(merged: Tensor, expected: list[float]) -> None:
        # Zeros beside large entries are as exact as those: libraries of linear algebra round in their own ways.
        least = 1e-7 * max(map(abs, expected))
        torch.testing.assert_close(merged, torch.tensor(expected), rtol=2e-6, atol=max(1e-12, least))

    check(method(case.ours).merge(vectors, seed, **case.parameters), paper)
    check(method(case.ours).merge(vectors, seed, **case.parameters, **MERGEKIT), theirs)
    check(merged_by_mergekit(case, seed, vectors), theirs)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_rescales_by_the_density_or_to_the_norm(name):
    """The one leaves the expectation as it is, the other the L1 norm of each expert."""
    expert = torch.linspace(1.0, 2.0, 1001)[None]
    paper = method(name).merge(expert, density=0.5, scale=1.0)
    torch.testing.assert_close(paper[paper != 0], 2.0 * expert[0][paper != 0])
    theirs = method(name).merge(expert, density=0.5, scale=1.0, **MERGEKIT)
    assert theirs.sum().item() == pytest.approx(expert.sum().item(), rel=1e-5)
    assert paper.sum().item() != pytest.approx(expert.sum().item(), rel=1e-3)


def test_della_refuses_the_epsilon_that_mergekit_refuses():
    case = Case(
        "della", {"density": 0.5, "epsilon": 0.5, **MERGEKIT}, "della", {"weight": 1.0, "epsilon": 0.5}
    )
    case.options["density"] = 0.5
    vectors = torch.ones(2, 4, 4)
    with pytest.raises(UserError, match="smaller epsilon"):
        method("della").merge(vectors, **case.parameters)
    with pytest.raises(ValueError, match="Epsilon must be chosen"):
        merged_by_mergekit(case, torch.zeros(4, 4), vectors)


def test_arcee_fusion_of_a_large_tensor_is_near_mergekits_estimate():
    """Above a million entries mergekit estimates the quartiles from a sample; the entries kept differ little."""
    seed, vectors = stack("related", 1, (1100, 1000))
    ours = method("arcee_fusion").merge(vectors, seed)
    theirs = merged_by_mergekit(Case("arcee_fusion", {}, "arcee_fusion", experts=1), seed, vectors)
    assert ((ours != 0) != (theirs != 0)).float().mean().item() < 0.01
