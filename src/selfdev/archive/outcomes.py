"""What a model scored on each question, as bytes: a bit where answers are right or wrong, else float64."""

from collections.abc import Sequence

import numpy as np


def pack(outcomes: Sequence[float] | None) -> tuple[bytes | None, bool]:
    """The bytes of outcomes, and whether they are graded: anything but truth values."""
    if outcomes is None:
        return None, False
    graded = any(not isinstance(outcome, bool) for outcome in outcomes)
    if graded:
        return np.asarray(outcomes, dtype="<f8").tobytes(), True
    return np.packbits(np.asarray(outcomes, dtype=bool)).tobytes(), False


def unpack(content: bytes | None, graded: bool, questions: int) -> tuple[float, ...] | None:
    """The outcomes of so many questions; of type bool where they are right or wrong."""
    if content is None:
        return None
    if graded:
        return tuple(np.frombuffer(content, dtype="<f8").tolist())
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=questions)
    return tuple(bool(bit) for bit in bits)


def pack_positions(positions: Sequence[int] | None) -> bytes | None:
    """The bytes of positions among a split's questions."""
    return None if positions is None else np.asarray(positions, dtype="<i4").tobytes()


def unpack_positions(content: bytes | None) -> tuple[int, ...] | None:
    """What `pack_positions` packed."""
    return None if content is None else tuple(np.frombuffer(content, dtype="<i4").tolist())
