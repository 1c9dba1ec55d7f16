"""One summary out of several of a document: the one that the others agree with most, or the nearest to a reference.

Agreement joins several models without running them together (Kobayashi 2018, "Frustratingly Easy Model Ensemble for
Abstractive Summarization"): where one errs, the others seldom err alike. The nearest to a reference says it in a
model's own words: sequence-level interpolation (Kim and Rush 2016, arXiv:1606.07947). Knows texts of one document. Does
not know who wrote them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from train.metrics import LineTokenizer


class Choice:
    """Chooses by the mean of ROUGE-1 and ROUGE-2 F1, stemmed, as they are reported."""

    def __init__(self) -> None:
        self._tokenizer = LineTokenizer()

    def consensus(self, candidates: Sequence[str]) -> str:
        """Against all candidates, itself among them: one that is given twice counts twice, for two say the same."""
        return self.nearest(candidates, candidates)

    def nearest(self, candidates: Sequence[str], to: Sequence[str]) -> str:
        """The first of the candidates that agree most with these texts.

        Raises:
            ValueError: no candidate, or no text.
        """
        if not candidates or not to:
            raise ValueError("there must be at least one candidate, and a text that it may be near to")
        words, judges = ([self._tokenizer.tokenize(text) for text in texts] for texts in (candidates, to))
        return candidates[int((agreement(words, judges) + agreement(_pairs(words), _pairs(judges))).argmax())]


def agreement(said: Sequence[Sequence[Hashable]], judges: Sequence[Sequence[Hashable]]) -> NDArray[np.float64]:
    """The mean F1 of what each candidate says against what each judge says, as often as it occurs: [candidates]."""
    columns: dict[Hashable, int] = {}
    for grams in (*said, *judges):
        for gram in grams:
            columns.setdefault(gram, len(columns))
    counts = np.zeros((len(said) + len(judges), len(columns)), np.int64)
    for row, grams in zip(counts, (*said, *judges), strict=True):
        for gram in grams:
            row[columns[gram]] += 1
    mine, theirs = counts[: len(said), None], counts[None, len(said) :]
    shared, lengths = np.minimum(mine, theirs).sum(-1), (mine + theirs).sum(-1)
    # Of two that say nothing it is 0 / 1.
    return np.asarray((2 * shared / np.maximum(lengths, 1)).mean(1))


def _pairs(said: Sequence[Sequence[str]]) -> list[list[tuple[str, str]]]:
    return [list(pairwise(words)) for words in said]
