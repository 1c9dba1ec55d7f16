"""How a summary relates to its source without a reference: length, novelty, coverage, density, repetition.

Knows words. Does not know tokens, meaning or scores. A word is a run of letters and digits, without case and accents,
so that an output of an uncased WordPiece model (`# person1 #`, `cafe`) compares with its source (`#Person1#`, `Café`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def folded(text: str) -> str:
    """Without accents and case."""
    parts = unicodedata.normalize("NFKD", text)
    return "".join(c for c in parts if not unicodedata.combining(c)).casefold()


def words(text: str) -> list[str]:
    """The words of a text, folded, in order."""
    return _WORD.findall(folded(text))


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every run of `n` words, in order; empty where there are fewer than `n`."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def novelty(summary: Sequence[str], source: Sequence[str], n: int) -> float | None:
    """Share of the summary's n-grams, each occurrence counted, that the source does not hold (See et al. 2017).

    None where the summary has fewer than `n` words: there is no n-gram to be new.
    """
    said = ngrams(summary, n)
    known = set(ngrams(source, n))
    return sum(gram not in known for gram in said) / len(said) if said else None


def fragments(summary: Sequence[str], source: Sequence[str]) -> list[int]:
    """Lengths of the extractive fragments of Grusky et al. 2018 (NAACL, figure 3; arXiv:1804.11283).

    From left to right the longest run of words that the source holds is one fragment, and the search goes on behind it;
    a word that the source does not hold is in none.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, word in enumerate(source):
        places[word].append(place)
    lengths = []
    i = 0
    while i < len(summary):
        longest = 0
        for place in places.get(summary[i], ()):
            length = 1
            while (
                i + length < len(summary)
                and place + length < len(source)
                and summary[i + length] == source[place + length]
            ):
                length += 1
            longest = max(longest, length)
        if longest:
            lengths.append(longest)
        i += max(longest, 1)
    return lengths


def coverage(summary: Sequence[str], source: Sequence[str]) -> float | None:
    """Share of the summary's words that stand in a fragment; None for an empty summary."""
    return sum(fragments(summary, source)) / len(summary) if summary else None


def density(summary: Sequence[str], source: Sequence[str]) -> float | None:
    """Mean length of the fragment that a word stands in; None for an empty summary."""
    return sum(length**2 for length in fragments(summary, source)) / len(summary) if summary else None


def repetition(summary: Sequence[str], n: int = 3) -> float | None:
    """Share of the summary's n-grams that it had said before; None where it has fewer than `n` words."""
    said = ngrams(summary, n)
    return 1 - len(set(said)) / len(said) if said else None
