"""SLERP: along the great circle between the weights of two experts."""

from torch import Tensor

from selfdev.algorithms.library.specification import MERGEKIT, PAPER, READING, Method, Paper, Parameter
from selfdev.algorithms.library.sphere import check_two, combination, gram
from selfdev.algorithms.library.sphere import slerp as along_great_circle

# Above this cosine mergekit interpolates linearly. Fine-tuned relatives of one seed nearly always lie above.
_MERGEKITS_PARALLEL = 0.9995


def slerp(task_vectors: Tensor, seed_tensor: Tensor, *, t: float = 0.5, reading: str = PAPER) -> Tensor:
    """Interpolate the weights of two experts along a great circle (Shoemake 1985, not on arXiv).

    With the angle a between two tensors: sin((1 - t) a) / sin(a) times the first plus sin(t a) / sin(a) times the
    second. Here they are the experts' weights, seed plus task vector. mergekit interpolates linearly where the
    cosine's magnitude exceeds 0.9995, which `reading="mergekit"` does too; here only where it is 1 to the precision
    of float32. A zero tensor, such as a bias, is at a right angle to every other, there as here. mergekit knows no
    seed: its base model is the first expert.

    Args:
        task_vectors: shape (2, *parameter), float32.
        seed_tensor: the seed's tensor, shape (*parameter), float32.
        t: how far to go from the first expert (0) to the second (1); any number, beyond them too, as in mergekit.
        reading: `paper` or `mergekit`.

    Returns:
        The merged task vector, shape (*parameter): what to add to the seed's tensor.
    """
    check_two(task_vectors)
    parallel = _MERGEKITS_PARALLEL if reading == MERGEKIT else None
    factors = along_great_circle(gram(task_vectors, seed_tensor), t, parallel, zero_is_orthogonal=True)
    return combination(factors, task_vectors, seed_tensor)


METHOD = Method(
    name="slerp",
    function=slerp,
    parameters=(Parameter("t", default=0.5, low=0.0, high=1.0), READING),
    paper=Paper("Shoemake", 1985, None),
    summary="along the great circle between the weights of two experts",
    needs_seed=True,
    experts=2,
)
