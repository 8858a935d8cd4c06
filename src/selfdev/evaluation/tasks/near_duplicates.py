"""Near-duplicates: questions that are rewordings of each other form one family, and a family lies in one split.

What is guaranteed. Two questions are one family if their words are the same, whatever their letter case, punctuation
and spaces; with `mask_numbers`, if at least `WORDY` words remain, also whatever their numbers. They are one family as
well if they are long enough to have `WORDY` words and share at least `OVERLAP` of their runs of three words (Jaccard
index), and so on along a chain: the families are the connected components. All pairs are compared, none by chance.

What is not: a question told in other words, or in another language, is another family.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

WORDY = 8
"""Words that a question needs before its numbers are masked and its runs of words are compared: `12 + 34 = ?` and
`What is 12 + 34?` are nothing without their numbers."""
OVERLAP = 0.7
"""Share of three-word runs in common that makes two questions one family."""

_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_WORD = re.compile(r"\d+|[^\W\d_]+|[-+*/^=<>%()$#]")


def families(texts: Sequence[str], *, mask_numbers: bool = True) -> list[int]:
    """The family of each text: the index of its first member.

    Args:
        texts: the questions.
        mask_numbers: whether wordy questions that differ in their numbers alone are one family.
    """
    words = [_words(text, mask_numbers) for text in texts]
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    first: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(words):
        join(first.setdefault(text, i), i)
    wordy = [i for i in first.values() if _is_wordy(words[i])]
    for i, j in _overlapping(
        [frozenset(zip(w, w[1:], w[2:], strict=False)) for w in map(words.__getitem__, wordy)]
    ):
        join(wordy[i], wordy[j])
    return [root(i) for i in range(len(texts))]


def _words(text: str, mask_numbers: bool) -> tuple[str, ...]:
    text = text.casefold()
    masked = tuple(_WORD.findall(_NUMBER.sub("#", text)))
    return masked if mask_numbers and _is_wordy(masked) else tuple(_WORD.findall(text))


def _is_wordy(words: Sequence[str]) -> bool:
    return sum(word.isalpha() for word in words) >= WORDY


def _overlapping(sets: Sequence[frozenset[tuple[str, ...]]]) -> list[tuple[int, int]]:
    """All pairs of sets whose Jaccard index is at least `OVERLAP`.

    Prefix filter (Bayardo, Ma and Srikant 2007, "Scaling up all pairs similarity search"): with each set's members
    sorted from rare to frequent, two sets that overlap so much share a member among the first few, so only those
    that do are compared.
    """
    frequency = Counter(member for each in sets for member in each)
    having: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    pairs = []
    for i, each in enumerate(sets):
        rare_first = sorted(each, key=lambda member: (frequency[member], member))
        prefix = rare_first[: len(each) - math.ceil(OVERLAP * len(each)) + 1]
        for j in {j for member in prefix for j in having[member]}:
            common = len(each & sets[j])
            if common >= OVERLAP * (len(each) + len(sets[j]) - common):
                pairs.append((j, i))
        for member in prefix:
            having[member].append(i)
    return pairs
