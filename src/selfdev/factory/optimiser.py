"""AdamW for one round of preference training, and what of it the next round may begin with.

Only where a round trains the very weights of the round before (`refinement.optimizer: continue`) do the moments of the
one belong to the weights of the other. A new LoRA adapter has matrices of its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from selfdev.factory.packing import Model
from selfdev.settings import RefinementSettings

Moments = Mapping[str, Tensor]
"""The state of AdamW: how many steps and both moments, by the names of the weights."""

_STATE = ("step", "exp_avg", "exp_avg_sq")


def optimiser(
    model: Model, settings: RefinementSettings, steps: int, moments: Moments | None = None
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW; its rate warms up over the first tenth of the steps and falls linearly to zero.

    Args:
        model: whose weights it trains, those that ask for a gradient.
        settings: the peak rate.
        steps: of the round.
        moments: with which it begins, from `kept_moments`; it changes them in place. None: anew.
    """
    trained = _trained(model)
    weights = list(trained.values())
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    for name, weight in trained.items():
        if moments is not None and f"{name}.step" in moments:
            optimizer.state[weight] = {key: moments[f"{name}.{key}"].to(weight.device) for key in _STATE}
    warm_up = max(1, steps // 10)
    schedule = LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, (steps - i) / max(1, steps - warm_up + 1))
    )
    return optimizer, schedule


def kept_moments(model: Model, optimizer: torch.optim.AdamW, settings: RefinementSettings) -> Moments | None:
    """What the next round's optimiser begins with; None where it begins anew. A weight without gradient has none."""
    if settings.optimizer == "fresh":
        return None
    return {
        f"{name}.{key}": optimizer.state[weight][key]
        for name, weight in _trained(model).items()
        if weight in optimizer.state
        for key in _STATE
    }


def _trained(model: Model) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
