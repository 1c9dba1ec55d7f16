"""The noise of denoising: text infilling and sentence permutation, after BART (Lewis et al. 2020, arXiv:1910.13461).

Knows sentences as lists of token ids. Does not know tokenizers, data sets or models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

# Between an end of sentence and the space after it, and before every line break: a turn of a dialogue is a sentence.
_BOUNDARY = re.compile(r"(?<=[.!?])(?=\s)|(?<=[.!?][\"')\]])(?=\s)|(?=\n)")


def split_sentences(text: str) -> list[str]:
    """Sentences, each with the space before it, so that joining them gives the text again.

    They end at `.`, `!` or `?` before a space, so abbreviations count as ends too, and at every line break.
    """
    return [sentence for sentence in _BOUNDARY.split(text) if sentence]


def permute(sentences: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Sequence[int]]:
    """The same sentences in a random order."""
    return [sentences[i] for i in rng.permutation(len(sentences))]


def infill(
    tokens: Sequence[int], mask_id: int, rng: np.random.Generator, share: float = 0.3, mean_span: float = 3.0
) -> list[int]:
    """Replace spans of tokens by one `mask_id` each.

    Lengths are drawn from Poisson(`mean_span`) until they cover `share` of the tokens (rounded up); the last one is
    cut to fit. A span of no token puts in a mask where nothing is missing, so that the model cannot count on one.
    Spans lie anywhere, do not overlap, and may touch. The first and last few tokens are masked a little less often.

    Args:
        tokens: ids without special tokens.
        share: 0 to 1.

    Returns:
        The kept tokens in their order, with the masks among them.
    """
    covered = math.ceil(share * len(tokens))
    spans: list[int] = []
    while sum(spans) < covered:
        spans.append(min(int(rng.poisson(mean_span)), covered - sum(spans)))
    # Before which of the kept tokens each span lies; the last place is behind all of them.
    places = np.sort(rng.integers(0, len(tokens) - covered + 1, size=len(spans)))
    noised: list[int] = []
    at = kept = 0
    for span, place in zip(spans, places.tolist(), strict=True):
        noised += tokens[at : at + place - kept]
        noised.append(mask_id)
        at += place - kept + span
        kept = place
    return [*noised, *tokens[at:]]
