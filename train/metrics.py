"""ROUGE as the field reports it: `rouge_score`, stemmed, raw references.

Knows one prediction against its references. Does not know where either came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
References = Literal["first", "mean", "best"]


def rouge_rows(
    predictions: Sequence[str], references: Sequence[Sequence[str]], use: References = "first"
) -> dict[str, list[float]]:
    """ROUGE F1 of each prediction, times 100.

    Args:
        predictions: one text a row.
        references: at least one raw text a row (never decoded from truncated labels: that inflates the score).
        use: against the first reference, the mean over all, or the best of all. They differ by 5 ROUGE-1 and more.
    """
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    rows: dict[str, list[float]] = {name: [] for name in ROUGE_TYPES}
    for prediction, options in zip(predictions, references, strict=True):
        chosen = options[:1] if use == "first" else options
        scores = [scorer.score(reference, prediction) for reference in chosen]
        for name in ROUGE_TYPES:
            values = [100 * score[name].fmeasure for score in scores]
            rows[name].append(max(values) if use == "best" else sum(values) / len(values))
    return rows


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], use: References = "first"
) -> dict[str, float]:
    """The mean over rows of `rouge_rows`."""
    return {name: sum(values) / len(values) for name, values in rouge_rows(predictions, references, use).items()}
