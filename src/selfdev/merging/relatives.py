"""A seed and its experts, found on this machine, and what identifies their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selfdev.merging.compatibility import check_distinct
from selfdev.models.folder import weights_hash
from selfdev.models.sources import Located, locate, resolve


@dataclass(frozen=True)
class Relatives:
    """A seed and its experts, found on this machine.

    Attributes:
        seed: its folder.
        experts: where each lies, by name, in the order in which algorithms see them.
        seed_hash: of the seed's weights.
        expert_hashes: of each expert's, by name.
    """

    seed: Path
    experts: dict[str, Located]
    seed_hash: str
    expert_hashes: dict[str, str]


def find_relatives(seed: str, experts: Mapping[str, str]) -> Relatives:
    """Find a seed and its experts, fetched first if they are not on this machine.

    Args:
        seed: where the seed comes from, as `selfdev.models.sources.resolve` takes it.
        experts: where the experts come from, by name, as `selfdev.models.sources.locate` takes them.

    Raises:
        UserError: a source that is none, or an expert that has the weights of the seed or of another one.
    """
    folder = resolve(seed)
    found = {name: locate(source, seed, pickled=True) for name, source in experts.items()}
    own, theirs = weights_hash(folder), {name: weights_hash(*each) for name, each in found.items()}
    check_distinct(own, theirs)
    return Relatives(folder, found, own, theirs)
