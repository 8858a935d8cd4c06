"""What a program says, made fit for terminals, logs and prompts, and the same in every run."""

import re

LONGEST = 300
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_UNPRINTABLE = re.compile(r"[^ -~]")


def clean(text: str) -> str:
    """At most 300 characters of printable ASCII, without addresses, of a text that may be anything.

    Every other character becomes a question mark. No list of bad ones would do: Unicode has characters that
    are invisible, pile up, or turn the direction of writing, and gets more of them every year.
    """
    text = _ADDRESS.sub("0x...", text)  # it differs from run to run, and a result must not
    return _UNPRINTABLE.sub("?", " ".join(text.split()))[:LONGEST]
