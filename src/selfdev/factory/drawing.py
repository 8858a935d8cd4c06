"""Drawing a token from a model's logits: temperature, then top-k, top-p and min-p, one uniform number a token."""

import torch
from torch import Tensor

FIRST = 64
"""So many of the most likely tokens are sorted at first, which is nearly always enough."""
WIDER = 8
"""How many times as many are sorted where it was not."""
BLOCK = 64
ROWS_AT_ONCE = 8


def draw(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse transform, the most likely token first.

    The cuts follow one another as in transformers: of the distribution at `temperature`, top-k keeps the k most likely
    tokens, top-p the smallest set of these whose share of what top-k kept reaches p (Holtzman et al. 2020, arXiv
    1904.09751), and min-p those with at least `min_p` times the probability of the most likely one (Nguyen et al.
    2024, arXiv 2407.01082). Each keeps the beginning of the sorted distribution, so only that is sorted. What is drawn
    in a row depends on that row alone. Tokens that are not allowed are as if the model did not know them: they go
    before the temperature and the cuts.

    Args:
        logits: shape (rows, vocabulary).
        uniform: one number in [0, 1) a row, shape (rows,).
        temperature: above 0.
        top_k: 0 for no such cut.
        top_p: in (0, 1]; 1 for no such cut.
        min_p: in [0, 1]; 0 for no such cut.
        allowed: bool, shape (rows, vocabulary), at least one token in every row; None for all tokens.

    Returns:
        The tokens, and their log-probabilities at temperature 1 before any cut, in nats, among all tokens; both of
        shape (rows,).
    """
    logits = logits.float()
    vocabulary = logits.shape[-1]
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    widest = min(top_k or vocabulary, vocabulary)
    width = widest if top_k else min(FIRST, widest)  # what top-p counts is shares of all that top-k kept
    rest = torch.arange(len(logits), device=logits.device)
    left = logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))
    top, ids = _largest(left, width)
    log_z, scaled_log_z = _log_z(left, top[:, :1], temperature)
    if allowed is not None:
        log_z, _ = _log_z(logits, logits.amax(-1, keepdim=True), temperature)
    while True:
        scaled = top / temperature
        share = torch.softmax(scaled, -1) if width == top_k else (scaled - scaled_log_z[rest]).exp()
        cumulative = share.cumsum(-1)
        drawable = (cumulative - share < top_p) & (share >= min_p * share[:, :1])
        if allowed is not None:
            drawable &= share > 0
        kept = drawable.sum(-1, keepdim=True)
        last = (kept - 1).clamp(min=0)
        # Where the cut lies within the width, all that can be drawn is known; where there is none, its share is 1.
        whole = (kept < width) | (width == widest)
        mass = torch.where(whole, cumulative.gather(-1, last), 1.0)
        place = torch.searchsorted(cumulative, uniform[rest, None] * mass, right=True)
        uncut = top_p == 1 and not top_k and not min_p
        ready = (whole | ((place < width) & uncut))[:, 0]
        tokens[rest[ready]] = ids.gather(-1, torch.minimum(place, last))[ready, 0]
        if ready.all():
            return tokens, (logits.gather(-1, tokens[:, None]) - log_z)[:, 0]
        rest, left, width = rest[~ready], left[~ready], min(width * WIDER, widest)
        top, ids = _largest(left, width)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, falling, and their tokens; both of shape (rows, count)."""
    blocks = logits.shape[-1] // BLOCK
    if blocks <= count:
        return logits.topk(count)
    # They lie in the blocks with the largest maxima and in what the blocks leave over: a tenth of topk's time.
    end = blocks * BLOCK
    largest = logits[:, :end].unflatten(-1, (blocks, BLOCK)).amax(-1).topk(count).indices
    tokens = torch.arange(BLOCK, device=logits.device) + largest[..., None] * BLOCK
    over = torch.arange(end, logits.shape[-1], device=logits.device).expand(len(logits), -1)
    tokens = torch.cat((tokens.flatten(1), over), -1)
    top, place = logits.gather(-1, tokens).topk(count)
    return top, tokens.gather(-1, place)


def _log_z(logits: Tensor, largest: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row's logits, at temperature 1 and at another, both of shape (rows, 1)."""
    one, other = [], []
    # A few rows at a time: what lies between then stays in the cache, which halves the time on a CPU.
    for some, its in zip(logits.split(ROWS_AT_ONCE), largest.split(ROWS_AT_ONCE), strict=True):
        below = some - its
        one.append(below.exp().sum(-1, keepdim=True))
        other.append((below / temperature).exp_().sum(-1, keepdim=True))
    return largest + torch.cat(one).log(), largest / temperature + torch.cat(other).log()
