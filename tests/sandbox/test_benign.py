"""Real algorithms work in the jail and give the numbers that they give outside."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import pytest
import torch
from benign_programs import PROGRAMS

from selfdev.sandbox import Sandbox

# MKL's least squares depends on where in memory its workspace lies, inside the jail and outside of it: 200 runs
# in one process without a jail differed by up to 6e-7 in numbers of about 1. So this program alone is compared
# to within 1e-5, about three digits less than float32 has; all others must agree in every bit.
DEPENDS_ON_MEMORY = {"lstsq_weights"}


@pytest.fixture(autouse=True)
def as_in_the_jail() -> Iterator[None]:
    """One thread, and no oneDNN, which adds up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    yield
    torch.backends.mkldnn.enabled = enabled
    torch.set_num_threads(threads)


def bare(source: str, model_dict: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    """The same call in this process."""
    torch.manual_seed(seed)
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(source, namespace)
        copies = {name: tensor.clone() for name, tensor in model_dict.items()}
        merged = namespace["merge_models"](copies, "cpu")  # type: ignore[operator]
    torch.set_num_threads(1)
    return (merged.to_dense() if merged.layout is not torch.strided else merged).detach().float()


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_numbers_as_outside(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    expected = bare(PROGRAMS[name], model_dict, seed=5)
    outcome = box.merge(PROGRAMS[name], model_dict, seed=5)
    assert outcome.ok, outcome
    assert outcome.tensor is not None
    tolerance = 1e-5 if name in DEPENDS_ON_MEMORY else 0.0
    torch.testing.assert_close(outcome.tensor, expected, rtol=tolerance, atol=tolerance)


# A plain child takes seconds to start, so `make test` tries three programs and `make proof` the rest.
FIRST = {"svd_truncation", "autograd_adam", "distributions"}


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.proof) for name in PROGRAMS]
)
def test_same_numbers_without_a_jail(
    name: str, box: Sandbox, plain_box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    expected = box.merge(PROGRAMS[name], model_dict, seed=5).tensor
    outcome = plain_box.merge(PROGRAMS[name], model_dict, seed=5)
    assert outcome.tensor is not None, outcome
    tolerance = 1e-5 if name in DEPENDS_ON_MEMORY else 0.0
    torch.testing.assert_close(outcome.tensor, expected, rtol=tolerance, atol=tolerance)


def test_there_are_at_least_thirty() -> None:
    assert len(PROGRAMS) >= 30
