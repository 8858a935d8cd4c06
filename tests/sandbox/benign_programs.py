"""Real merging algorithms that use torch broadly. All of them must work in the jail with the numbers of outside.

Each takes four task vectors of shape (12, 8).
"""

PROGRAMS = {
    "average": """
def merge_models(model_dict, device):
    return sum(model_dict.values()) / len(model_dict)
""",
    "inverse_distance": """
import torch

def merge_models(model_dict, device):
    vectors = torch.stack([v.to(device) for v in model_dict.values()])
    flat = vectors.flatten(1)
    distances = torch.cdist(flat, flat).sum(1)
    weights = 1 / (distances + 1e-8)
    weights = weights / weights.sum()
    return torch.tensordot(weights, vectors, dims=1)
""",
    "ties_by_topk": """
import torch

def merge_models(model_dict, device):
    stack = torch.stack(list(model_dict.values()))
    flat = stack.flatten(1)
    k = max(1, flat.shape[1] // 5)
    threshold = flat.abs().topk(k, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= threshold, flat, torch.zeros_like(flat))
    sign = torch.sign(trimmed.sum(0))
    agree = (torch.sign(trimmed) == sign) & (trimmed != 0)
    return ((trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)).view(stack.shape[1:])
""",
    "dare_seeded_dropout": """
import torch

def merge_models(model_dict, device):
    out = 0
    for v in model_dict.values():
        mask = torch.rand_like(v) > 0.5
        out = out + v * mask / 0.5
    return out / len(model_dict)
""",
    "own_generator": """
import torch

def merge_models(model_dict, device):
    g = torch.Generator(device=device).manual_seed(7)
    v = torch.stack(list(model_dict.values()))
    noise = torch.randn(v.shape, generator=g)
    return (v + 0.01 * noise).mean(0) + torch.randperm(8).float() * torch.bernoulli(torch.full((8,), 0.5))
""",
    "svd_truncation": """
import torch

def merge_models(model_dict, device):
    mean = torch.stack(list(model_dict.values())).mean(0)
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    s[s.numel() // 2 :] = 0
    return u @ torch.diag(s) @ vh
""",
    "isotropic_spectrum": """
import torch

def merge_models(model_dict, device):
    total = sum(model_dict.values())
    u, s, v = torch.svd(total)
    return u @ (s.mean() * v.T)
""",
    "qr_basis": """
import torch

def merge_models(model_dict, device):
    vs = list(model_dict.values())
    q, r = torch.linalg.qr(torch.cat(vs, dim=1))
    return q @ (q.T @ (sum(vs) / len(vs)))
""",
    "eigh_of_gram": """
import torch

def merge_models(model_dict, device):
    stack = torch.stack(list(model_dict.values()))
    flat = stack.flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    w = vectors[:, -1].abs()
    return torch.einsum("e,eij->ij", w / w.sum(), stack)
""",
    "eig_and_complex": """
import torch

def merge_models(model_dict, device):
    m = torch.stack(list(model_dict.values())).mean(0)
    values = torch.linalg.eigvals(m.T @ m)
    return m / values.abs().max()
""",
    "lstsq_weights": """
import torch

def merge_models(model_dict, device):
    vs = torch.stack(list(model_dict.values())).flatten(1)
    target = vs.median(0).values
    w = torch.linalg.lstsq(vs.T, target.unsqueeze(1)).solution.squeeze(1)
    return (w @ vs).view(next(iter(model_dict.values())).shape)
""",
    "solve_inverse_cholesky": """
import torch

def merge_models(model_dict, device):
    stack = torch.stack(list(model_dict.values()))
    flat = stack.flatten(1)
    gram = flat @ flat.T + torch.eye(len(flat))
    a = torch.linalg.solve(gram, torch.ones(len(flat)))
    b = torch.linalg.inv(gram).sum(0)
    c = torch.cholesky_solve(torch.ones(len(flat), 1), torch.linalg.cholesky(gram)).squeeze(1)
    w = (a + b + c) / 3 + torch.linalg.det(gram) * 1e-9
    return torch.tensordot(w, stack, dims=1)
""",
    "pinv_matrix_exp_norms": """
import torch

def merge_models(model_dict, device):
    m = torch.stack(list(model_dict.values())).mean(0)
    p = torch.linalg.pinv(m)
    e = torch.linalg.matrix_exp(0.01 * (p @ m))
    return m @ e / (torch.linalg.matrix_norm(m, ord=2) + torch.linalg.norm(m) + torch.linalg.cond(m) * 0)
""",
    "quantile_clip": """
import torch

def merge_models(model_dict, device):
    stack = torch.stack(list(model_dict.values()))
    low = torch.quantile(stack, 0.1, dim=0)
    high = torch.quantile(stack, 0.9, dim=0, interpolation="nearest")
    return torch.clamp(stack.mean(0), low, high) + torch.nanquantile(stack, 0.5) * 0.1
""",
    "median_mode_kthvalue": """
import torch

def merge_models(model_dict, device):
    s = torch.stack(list(model_dict.values()))
    return s.median(dim=0).values + s.kthvalue(2, dim=0).values + s.round().mode(0).values
""",
    "sort_cumsum_searchsorted": """
import torch

def merge_models(model_dict, device):
    out = torch.zeros_like(next(iter(model_dict.values())))
    for v in model_dict.values():
        ordered, index = torch.sort(v.abs().flatten(), descending=True)
        energy = torch.cumsum(ordered**2, 0)
        k = torch.searchsorted(energy, 0.9 * energy[-1]).item() + 1
        mask = torch.zeros(v.numel(), dtype=torch.bool).scatter_(0, index[:k], True)
        out += v * mask.view_as(v)
    return out / len(model_dict)
""",
    "fft_low_pass": """
import torch

def merge_models(model_dict, device):
    m = torch.stack(list(model_dict.values())).mean(0)
    f = torch.fft.rfft(m, dim=-1)
    f[..., 3:] = 0
    g = torch.fft.ifft2(torch.fft.fft2(m)).real
    return torch.fft.irfft(f, n=m.shape[-1], dim=-1) + g
""",
    "einsum_attention": """
import torch
import torch.nn.functional as F

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    scores = torch.einsum("eij,fij->ef", x, x) / x[0].numel() ** 0.5
    return torch.einsum("ef,fij->eij", F.softmax(scores, dim=-1), x).mean(0)
""",
    "scaled_dot_product": """
import torch
import torch.nn.functional as F

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values())).unsqueeze(0)
    return F.scaled_dot_product_attention(x, x, x).squeeze(0).mean(0)
""",
    "float16": """
import torch

def merge_models(model_dict, device):
    half = [v.half() for v in model_dict.values()]
    m = torch.stack(half).mean(0)
    return (m @ (m.T @ m)).float() * 0.01 + m.float()
""",
    "bfloat16": """
import torch

def merge_models(model_dict, device):
    x = torch.stack([v.to(torch.bfloat16) for v in model_dict.values()])
    return (x.mean(0) @ (x[0].T @ x[1])) * 0.01
""",
    "float64_and_ints": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values())).double()
    bits = (x * 1000).to(torch.int64)
    votes = (bits > 0).int().sum(0)
    return torch.where(votes >= 2, x.max(0).values, x.min(0).values) + (bits // 7 % 3).double().mean(0)
""",
    "sparse": """
import torch

def merge_models(model_dict, device):
    out = None
    for v in model_dict.values():
        kept = torch.where(v.abs() > 0.5, v, 0.0).to_sparse()
        product = torch.sparse.mm(kept, torch.eye(v.shape[1]))
        out = product if out is None else out + product
    return out + torch.where(v > 1, v, 0.0).to_sparse_csr().to_dense()
""",
    "sparse_result": """
import torch

def merge_models(model_dict, device):
    v = sum(model_dict.values())
    return torch.where(v.abs() > 0.5, v, 0.0).to_sparse()
""",
    "vmap": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    unit = torch.vmap(lambda v: v / (torch.linalg.norm(v) + 1e-6))(x)
    rows = torch.vmap(torch.vmap(torch.dot))(x, x.flip(0))
    return unit.mean(0) * rows.mean(0).unsqueeze(1)
""",
    "func_grad": """
import torch
from torch.func import grad, vmap

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    w = torch.full((len(x),), 1.0 / len(x))

    def loss(w):
        return ((torch.tensordot(w, x, dims=1) - x.median(0).values) ** 2).mean()

    for _ in range(5):
        w = w - 0.1 * grad(loss)(w)
    steps = vmap(grad(loss))(torch.stack([w, w * 2]))
    return torch.tensordot(w - steps.mean(0), x, dims=1)
""",
    "autograd_adam": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    w = torch.zeros(len(x), requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        merged = torch.tensordot(torch.softmax(w, 0), x, dims=1)
        loss = sum(1 - torch.nn.functional.cosine_similarity(merged.flatten(), v.flatten(), dim=0) for v in x)
        loss.backward()
        optimizer.step()
    return torch.tensordot(torch.softmax(w, 0), x, dims=1)
""",
    "autograd_sgd_scheduler": """
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

def merge_models(model_dict, device):
    x = list(model_dict.values())
    p = torch.nn.Parameter(sum(x) / len(x))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    scheduler = CosineAnnealingLR(optimizer, T_max=5)
    for _ in range(5):
        optimizer.zero_grad()
        loss = sum(torch.nn.functional.huber_loss(p, v) for v in x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()
        scheduler.step()
    return p
""",
    "lbfgs": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    w = torch.ones(len(x), requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = ((torch.tensordot(w, x, dims=1) - x.median(0).values) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.tensordot(w.detach(), x, dims=1)
""",
    "other_optimisers": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    total = torch.zeros_like(x[0])
    kinds = [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam,
             torch.optim.Adadelta, torch.optim.Adamax, torch.optim.Rprop, torch.optim.ASGD]
    for kind in kinds:
        w = torch.zeros(len(x), requires_grad=True)
        optimizer = kind([w], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (torch.tensordot(torch.sigmoid(w), x, dims=1) ** 2).mean().backward()
            optimizer.step()
        total += torch.tensordot(torch.sigmoid(w.detach()), x, dims=1)
    return total / len(kinds)
""",
    "module_training": """
import torch
from torch import nn

class Gate(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.1), nn.Linear(16, n))

    def forward(self, f):
        return torch.softmax(self.net(f), -1)

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values())).to(device)
    gate = Gate(len(x)).to(device)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2)
    f = x.flatten(1).std(1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = (torch.tensordot(gate(f), x, dims=1) - x.mean(0)).pow(2).mean()
        loss.backward()
        optimizer.step()
    gate.eval()
    with torch.no_grad():
        return torch.tensordot(gate(f), x, dims=1)
""",
    "autograd_grad_hessian": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    w = torch.full((len(x),), 0.25, requires_grad=True)
    loss = (torch.tensordot(w, x, dims=1) ** 4).mean()
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), w)
    hess = torch.autograd.functional.hessian(lambda w: (torch.tensordot(w, x, dims=1) ** 3).sum(), w)
    return torch.tensordot((w - 0.1 * g / (h.abs() + 1)).detach() + hess.detach().sum(0) * 1e-4, x, dims=1)
""",
    "custom_autograd_function": """
import torch

class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.sign()

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return g * (v.abs() < 1)

def merge_models(model_dict, device):
    p = sum(model_dict.values()).clone().requires_grad_()
    (Sign.apply(p) * p).sum().backward()
    return p.grad
""",
    "convolution": """
import torch
import torch.nn.functional as F

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values())).unsqueeze(1)
    kernel = torch.ones(1, 1, 3, 3) / 9
    smooth = F.conv2d(x, kernel, padding=1)
    pooled = F.interpolate(F.avg_pool2d(smooth, 2), size=x.shape[-2:], mode="bilinear", align_corners=False)
    line = F.conv1d(x[:, 0], torch.ones(12, 12, 3) / 36, padding=1)
    return (smooth + pooled).mean(0).squeeze(0) + F.max_pool1d(line, 1).mean(0)
""",
    "distributions": """
import torch
from torch.distributions import Dirichlet, Normal, kl_divergence

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    w = Dirichlet(torch.ones(len(x))).sample()
    d = [Normal(v.mean(), v.std()) for v in x]
    k = torch.stack([kl_divergence(p, d[0]) for p in d])
    return torch.tensordot(w / (1 + k), x, dims=1)
""",
    "slerp": """
import math
import torch

def merge_models(model_dict, device):
    a, b, *rest = model_dict.values()
    cos = torch.sum(a * b) / (a.norm() * b.norm() + 1e-8)
    theta = math.acos(max(-1.0, min(1.0, cos.item())))
    if abs(math.sin(theta)) < 1e-6:
        return (a + b) / 2
    return (math.sin(0.5 * theta) * a + math.sin(0.5 * theta) * b) / math.sin(theta)
""",
    "standard_library": """
import collections
import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

class Pair(NamedTuple):
    left: str
    right: str

@dataclass(frozen=True)
class Weight:
    name: str
    value: float = 0.0
    history: List[float] = field(default_factory=list)

@functools.lru_cache(maxsize=None)
def scale(n: int) -> float:
    return 1.0 if n < 2 else math.sqrt(n) * scale(n - 1) ** 0.1

def merge_models(model_dict: Dict[str, Tensor], device: Optional[str] = None) -> Tensor:
    totals: Dict[str, float] = collections.defaultdict(float)
    for a, b in itertools.combinations(sorted(model_dict), 2):
        pair = Pair(a, b)
        totals[pair.left] += float((model_dict[pair.left] * model_dict[pair.right]).sum())
    weights = [Weight(name, math.tanh(totals[name])) for name in model_dict]
    return functools.reduce(torch.add, (w.value * model_dict[w.name] for w in weights)) * scale(4)
""",
    "in_place_on_inputs": """
import torch

def merge_models(model_dict, device):
    names = list(model_dict)
    first = model_dict[names[0]]
    for name in names[1:]:
        first.add_(model_dict.pop(name))
    first[first.abs() < 0.1] = 0
    return first.div_(len(names))
""",
    "prints_and_formats": """
import torch

def merge_models(model_dict, device):
    for name, v in model_dict.items():
        print(name, v, v.shape, f"{v.norm():.3f}", repr(v.dtype), device)
    print(torch.cat([v.flatten() for v in model_dict.values()]).histc(10).tolist())
    return max(model_dict.values(), key=lambda v: v.norm())
""",
    "catches_errors": """
import torch

def merge_models(model_dict, device):
    m = torch.stack(list(model_dict.values())).mean(0)
    try:
        torch.linalg.cholesky(m)
    except Exception:
        m = m * 0.5
    try:
        torch.linalg.inv(torch.zeros(3, 3))
    except torch.linalg.LinAlgError:
        m = m * 0.5
    return m
""",
    "no_grad_and_inference": """
import torch

@torch.no_grad()
def merge_models(model_dict, device):
    with torch.inference_mode():
        x = torch.stack(list(model_dict.values()))
        y = torch.nn.functional.normalize(x.flatten(1), dim=1)
    return (y.clone() * x.flatten(1).norm(dim=1, keepdim=True)).view_as(x).mean(0)
""",
    "clustering": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values())).flatten(1)
    centers = x[torch.randperm(len(x))[:2]].clone()
    for _ in range(5):
        label = torch.cdist(x, centers).argmin(1)
        for k in range(2):
            if (label == k).any():
                centers[k] = x[label == k].mean(0)
    counts = torch.bincount(label, minlength=2)
    unique, inverse = torch.unique(label, return_inverse=True)
    return centers[counts.argmax()].view(next(iter(model_dict.values())).shape)
""",
    "indexing": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    best = x.abs().argmax(0, keepdim=True)
    picked = torch.gather(x, 0, best).squeeze(0)
    picked.index_add_(0, torch.tensor([0, 2]), torch.ones(2, picked.shape[1]))
    picked.scatter_reduce_(0, torch.zeros(1, picked.shape[1], dtype=torch.long), x[0][:1], reduce="amax")
    rolled = torch.roll(picked, 1, 0).tril() + torch.triu(picked, 1)
    i, j = torch.meshgrid(torch.arange(12), torch.arange(8), indexing="ij")
    return torch.where((i + j) % 2 == 0, rolled, picked).masked_fill(picked.isnan(), 0.0)
""",
    "special_functions": """
import torch

def merge_models(model_dict, device):
    m = torch.stack(list(model_dict.values())).mean(0)
    y = torch.special.expit(m) + torch.erf(m) + torch.lgamma(m.abs() + 1) + torch.special.i0(m)
    return torch.logsumexp(torch.stack([y, m]), 0) + torch.special.xlogy(m.abs(), m.abs() + 1) + torch.digamma(m.abs() + 1)
""",
    "low_rank": """
import torch

def merge_models(model_dict, device):
    m = torch.cat(list(model_dict.values()), 1)
    u, s, v = torch.svd_lowrank(m, q=4)
    p, q, r = torch.pca_lowrank(m, q=3)
    return (u @ torch.diag(s) @ v.T)[:, :8] + (p @ torch.diag(q) @ r.T)[:, 8:16] * 0.1
""",
    "kron_and_covariance": """
import torch

def merge_models(model_dict, device):
    x = torch.stack(list(model_dict.values()))
    c = torch.corrcoef(x.flatten(1)) + torch.cov(x.flatten(1))
    k = torch.kron(c, torch.eye(3))[:12, :8]
    return x.mean(0) + 0.01 * k + torch.block_diag(x[0][:6, :4], x[1][:6, :4])
""",
    "parametrize": """
import torch
from torch import nn

def merge_models(model_dict, device):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 12, bias=False))
    with torch.no_grad():
        return layer.weight * 0.1 + sum(model_dict.values())
""",
    "multithreaded_wish": """
import torch

def merge_models(model_dict, device):
    torch.set_num_threads(4)
    big = torch.ones(600, 600) @ torch.ones(600, 600)
    return sum(model_dict.values()) * big.mean()
""",
}
