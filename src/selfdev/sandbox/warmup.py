"""Everything that torch does on first use, done before the first fork.

In the jail no file can be opened and no thread started. What torch reads or imports late would fail there
with a misleading error, or silently give other numbers: without /proc/cpuinfo it takes kernels that are not
vectorised. So each family of functions runs once here, in the forkserver, and leaves nothing behind but
loaded modules.
"""

import importlib
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import compiler_standin

_MODULES = (
    "collections.abc",
    "dataclasses",
    "functools",
    "itertools",
    "math",
    "typing",
    "torch.autograd.functional",
    "torch.distributions",
    "torch.fft",
    "torch.func",
    "torch.linalg",
    "torch.nn.utils",
    "torch.nn.utils.parametrizations",
    "torch.optim.lr_scheduler",
    "torch.optim.swa_utils",
    "torch.random",
    "torch.sparse",
    "torch.special",
    "torch.types",
    "torch.utils.serialization",
)


def warm() -> None:
    """Bring this process to the state in which every child is born: one thread, no JIT, all imported."""
    torch.set_num_threads(1)
    # oneDNN writes code into memory and runs it, which the jail forbids.
    torch.backends.mkldnn.set_flags(False)
    state = torch.get_rng_state()
    compiler_standin.install()
    try:
        _exercise()
    except (AttributeError, ImportError):
        # This version of torch asks more of its compiler than the stand-in knows.
        compiler_standin.remove()
        importlib.import_module("torch._dynamo")
        _exercise()
    torch.set_rng_state(state)
    random.seed(0)
    # From here on nothing more can be loaded. Say so, instead of a permission error from deep inside.
    sys.meta_path[:] = [_NothingMore]


class _NothingMore:
    """The import system's last word in the jail."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        raise ModuleNotFoundError(f"module {name!r} is not loaded, and the jail can load no more", name=name)


def _exercise() -> None:
    """Use each family of functions once."""
    for name in _MODULES:
        importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in _FAMILIES:
            family(torch.arange(64.0).view(8, 8).sin() + torch.eye(8))


def _elementwise(x: Tensor) -> None:
    big = x.repeat(64, 64)
    (big + big.mean() * big.std() - big.median()).clamp(-1, 1)
    big.abs().topk(3)
    big.sort()
    torch.quantile(x, 0.5)
    torch.stack([x, x]).mode(0)
    torch.unique(x.round())
    x.histc(4)
    x.softmax(0).log().lgamma()
    torch.where(x > 0, x, 0.0).sum().item()


def _printing(x: Tensor) -> None:
    repr(x)
    f"{x.norm():.3f} {x.dtype} {x.half()} {x.to_sparse()}"


def _linear_algebra(x: Tensor) -> None:
    square = x @ x.T + 8 * torch.eye(8)
    torch.linalg.svd(x)
    torch.linalg.qr(x)
    torch.linalg.eigh(square)
    torch.linalg.eig(x)
    torch.linalg.lstsq(x, x)
    torch.linalg.solve(square, x)
    torch.linalg.pinv(square)
    torch.linalg.cholesky(square)
    torch.linalg.matrix_exp(x * 0.01)
    torch.linalg.slogdet(square)
    torch.svd_lowrank(x, q=2)
    torch.cdist(x, x)
    torch.einsum("ij,jk->ik", x, x)
    large = x.repeat(32, 32)
    large @ large


def _other_numbers(x: Tensor) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.complex64):
        y = x.to(dtype)
        (y @ y).sum()
        y.repeat(16, 16) @ y.repeat(16, 16)
    torch.fft.irfft2(torch.fft.rfft2(x))
    torch.sparse.mm(x.to_sparse(), x)
    x.to_sparse_csr() @ x


def _randomness(x: Tensor) -> None:
    torch.rand_like(x)
    torch.randn(8).bernoulli(0.5)
    torch.randperm(8)
    torch.multinomial(x.abs(), 2)
    torch.distributions.Dirichlet(torch.ones(3)).sample()
    torch.manual_seed(0)
    torch.Generator().manual_seed(0)


def _layers(x: Tensor) -> None:
    image = x.view(1, 1, 8, 8)
    F.conv2d(image, torch.ones(1, 1, 3, 3))
    F.interpolate(image, scale_factor=2, mode="bilinear")
    F.scaled_dot_product_attention(image, image, image)
    nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Dropout(0.1))(x)
    nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))(x)


def _gradients(x: Tensor) -> None:
    def loss(w: Tensor) -> Tensor:
        return (w * x).tanh().pow(2).mean()

    w = torch.ones(8, requires_grad=True)
    for optimizer in (torch.optim.Adam([w]), torch.optim.SGD([w], momentum=0.9), torch.optim.LBFGS([w])):
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        optimizer.step(lambda value=value: value)  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([w], 1.0)
    torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([w], lr=0.1), T_max=2).step()
    torch.autograd.functional.hessian(loss, torch.ones(8))


def _transforms(x: Tensor) -> None:
    def loss(w: Tensor) -> Tensor:
        return (w * x).pow(2).mean()

    w = torch.ones(8)
    torch.vmap(torch.dot)(x, x)
    torch.func.grad(loss)(w)


_FAMILIES: tuple[Callable[[Tensor], None], ...] = (
    _elementwise,
    _printing,
    _linear_algebra,
    _other_numbers,
    _randomness,
    _layers,
    _gradients,
    _transforms,
)
