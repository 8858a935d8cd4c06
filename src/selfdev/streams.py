"""Random streams by name: a result depends on (run seed, what it is for), never on timing or on what came before."""

import hashlib


def stream_seed(seed: int, *purpose: str | int) -> int:
    """Returns a seed in 0..2**63 - 1 for one purpose of a run, such as `("sample", iteration, number)`."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
