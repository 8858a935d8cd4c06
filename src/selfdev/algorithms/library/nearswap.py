"""NearSwap: follow an expert only as far as it stays near the seed."""

from torch import Tensor

from selfdev.algorithms.library.blocks import entrywise
from selfdev.algorithms.library.specification import MERGEKIT, PAPER, READING, Method, Paper, Parameter
from selfdev.errors import UserError

# mergekit counts smaller differences as this one.
_LEAST = 1e-6


def nearswap(task_vectors: Tensor, *, t: float = 0.001, scale: float = 1.0, reading: str = PAPER) -> Tensor:
    """Limit every entry of each task vector to [-t, t], then add (alchemonaut 2024, mergekit's NearSwap; no paper).

    The original moves from the seed to one expert with the weight min(t / |difference|, 1) at each entry,
    which is the difference clipped to [-t, t]. For several experts the clipped task vectors are added: our
    extension.

    mergekit divides t by at least 1e-6, which changes nothing unless t is smaller: differences below 1e-6 are
    then shrunk by the factor t / 1e-6 in `reading="mergekit"`.

    Args:
        task_vectors: shape (experts, *parameter), float32.
        t: the farthest that an entry moves for one expert, in units of the weights; above 0.
        scale: factor on the sum, any number; 1 is the original.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter).
    """
    if not t > 0.0:
        raise UserError(f"t {t}: it is the farthest an entry may move; give a number above 0")

    def merged(block: Tensor) -> Tensor:
        if reading == MERGEKIT and t < _LEAST:
            weights = (t / block.abs().clamp_(min=_LEAST)).clamp_(max=1.0)
            return weights.mul_(block).sum(dim=0)
        return block.clamp(-t, t).sum(dim=0)

    return entrywise(merged, task_vectors).mul_(scale)


METHOD = Method(
    name="nearswap",
    function=nearswap,
    parameters=(
        Parameter("t", default=0.001, low=1e-4, high=0.1, log=True),
        Parameter("scale", default=1.0, low=0.1, high=3.0, log=True, screened=False),
        READING,
    ),
    paper=Paper("alchemonaut", 2024, None),
    summary="entries clipped to a small distance from the seed, added",
    entrywise=True,
)
