"""What a refinement minimises: losses by name, each of them a pure function.

The *gain* of a completion is log p_model - log p_reference, summed over its tokens, in nats; the *margin* of a pair is
the gain of the chosen one minus that of the rejected one. `beta`, above 0, is the strength of the pull towards the
reference. docs/learning.md says when to use which, and what TRL calls it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Name = Literal["sigmoid", "ipo", "hinge", "robust", "kto"]

LARGEST_FLIP_RATE = 0.45
"""Where a flip rate is cut: the robust loss divides by 1 - 2 flip_rate, and its variance grows with the square."""


def sigmoid(margin: Tensor, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290).

    -log sigmoid(beta margin)

    Args:
        margin: nats, shape (pairs,).
        beta: see above.

    Returns:
        The loss of each pair, shape (pairs,); log 2 at margin 0.
    """
    return -F.logsigmoid(beta * margin)


def hinge(margin: Tensor, beta: float) -> Tensor:
    """SLiC's hinge on DPO's margin (Zhao et al. 2023, arXiv 2305.10425).

    max(0, 1 - beta margin)

    Args and result as in `sigmoid`. A pair whose margin has reached 1 / beta teaches nothing more.
    """
    return F.relu(1 - beta * margin)


def ipo(margin_a_token: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, equation 17).

    (margin - 1 / (2 beta))^2

    Args:
        margin_a_token: the chosen completion's gain divided by its tokens, minus the rejected one's divided by its
            own, nats a token, shape (pairs,). The paper's margin is a sum; by the token the target does not depend
            on how long the programs are, and this is what TRL computes.
        beta: the paper's tau: the margin is pulled to 1 / (2 beta) and not beyond.

    Returns:
        The loss of each pair, shape (pairs,).
    """
    return (margin_a_token - 1 / (2 * beta)) ** 2


def robust(margin: Tensor, beta: float, flip_rate: float) -> Tensor:
    """DPO made unbiased for labels of which some are flipped (Chowdhury et al. 2024, arXiv 2403.00409).

    ((1 - e) sigmoid(margin) - e sigmoid(-margin)) / (1 - 2 e), with e the flip rate.

    Args:
        margin: nats, shape (pairs,).
        beta: see above.
        flip_rate: share of the pairs that are the wrong way round, in [0, 0.5); 0 makes it `sigmoid`.

    Returns:
        The loss of each pair, shape (pairs,); log 2 at margin 0.
    """
    right, wrong = sigmoid(margin, beta), sigmoid(-margin, beta)
    return ((1 - flip_rate) * right - flip_rate * wrong) / (1 - 2 * flip_rate)


def kto(chosen: Tensor, rejected: Tensor, beta: float, reference_point: Tensor) -> Tensor:
    """A loss without pairs, after KTO (Ethayarajh et al. 2024, arXiv 2402.01306).

    Each program counts for itself: mean of 1 - sigmoid(beta (gain - z)) over the chosen, plus the mean of
    1 - sigmoid(beta (z - gain)) over the rejected, so that both sides weigh the same however many they are.

    Args:
        chosen: gains of distinct completions, nats, shape (chosen,).
        rejected: the same of the others, shape (rejected,); it may be empty.
        beta: see above.
        reference_point: z, what a gain is measured from, nats, a scalar; see `kto_reference_point`.

    Returns:
        The loss, a scalar in (0, 2); 1 where all gains are z, and half of that where nothing is rejected.
    """
    liked = 1 - torch.sigmoid(beta * (chosen - reference_point))
    disliked = 1 - torch.sigmoid(beta * (reference_point - rejected))
    # What is liked under a prompt may be all that there is.
    return liked.mean() + (disliked.mean() if len(disliked) else 0)


def kto_reference_point(gain: Tensor) -> Tensor:
    """How far the model has moved from its reference: max(0, mean gain), without gradient.

    KTO estimates KL(model || reference) from completions of other prompts. A step has one prompt, so its own
    completions stand in; hence "after" KTO.

    Args:
        gain: of all completions of a step, nats, shape (completions,).
    """
    return gain.detach().mean().clamp(min=0)


def preference_loss(
    name: Name, gain: Tensor, tokens: Tensor, pairs: Tensor, *, beta: float, flip_rate: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One step's loss by its name.

    Args:
        name: which.
        gain: of each completion, nats, shape (completions,).
        tokens: how many each completion has, shape (completions,).
        pairs: indices (chosen, rejected) of completions, shape (pairs, 2).
        beta: see above.
        flip_rate: see `robust`; the others do not use it.

    Returns:
        The mean loss, and the mean margin in nats whatever the loss is; scalars.
    """
    margin = gain[pairs[:, 0]] - gain[pairs[:, 1]]
    if name == "sigmoid":
        loss = sigmoid(margin, beta).mean()
    elif name == "hinge":
        loss = hinge(margin, beta).mean()
    elif name == "ipo":
        a_token = gain / tokens
        loss = ipo(a_token[pairs[:, 0]] - a_token[pairs[:, 1]], beta).mean()
    elif name == "robust":
        loss = robust(margin, beta, flip_rate).mean()
    else:
        liked, disliked = pairs[:, 0].unique(), pairs[:, 1].unique()
        # What is preferred to one program and not to another is good enough to be liked.
        disliked = disliked[~torch.isin(disliked, liked)]
        loss = kto(gain[liked], gain[disliked], beta, kto_reference_point(gain[pairs.unique()]))
    return loss, margin.mean()
