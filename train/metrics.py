"""ROUGE as the field reports it: `rouge_score`, stemmed, raw references.

Knows one prediction against its references. Does not know where either came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from train.units import sentences

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
# rougeLsum matches sentence by sentence; the papers' ROUGE-L on CNN/DailyMail is this one.
ALL_ROUGE_TYPES = (*ROUGE_TYPES, "rougeLsum")
ROUGE_NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
References = Literal["first", "mean", "best"]


class LineTokenizer(Tokenizer):
    """The stemmed tokens of `rouge_score`, of which each line is remembered: the same lines are scored many times."""

    def __init__(self) -> None:
        self._line = lru_cache(maxsize=100_000)(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        """Lower-cased, stemmed words of letters a to z and digits."""
        return [token for line in text.split("\n") for token in self._line(line)]


def rouge_rows(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    use: References = "first",
    types: Sequence[str] = ROUGE_TYPES,
) -> dict[str, list[float]]:
    """ROUGE F1 of each prediction, times 100.

    Args:
        predictions: one text a row.
        references: at least one raw text a row (never decoded from truncated labels: that inflates the score).
        use: against the first reference, the mean over all, or the best of all. They differ by 5 ROUGE-1 and more.
        types: which of `ALL_ROUGE_TYPES`. For rougeLsum texts are cut into sentences by `train.units`; where a text
            came with a sentence a line, the lines are sentences.
    """
    scorer = RougeScorer(list(types), tokenizer=LineTokenizer())
    rows: dict[str, list[float]] = {name: [] for name in types}
    for prediction, options in zip(predictions, references, strict=True):
        chosen = options[:1] if use == "first" else options
        said = _a_sentence_a_line(prediction)
        scores = [scorer.score(_a_sentence_a_line(reference), said) for reference in chosen]
        for name in types:
            values = [100 * score[name].fmeasure for score in scores]
            rows[name].append(max(values) if use == "best" else sum(values) / len(values))
    return rows


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    use: References = "first",
    types: Sequence[str] = ROUGE_TYPES,
) -> dict[str, float]:
    """The mean over rows of `rouge_rows`."""
    return {name: sum(values) / len(values) for name, values in rouge_rows(predictions, references, use, types).items()}


def is_unscorable(reference: str) -> bool:
    """Whether it has letters, of which ROUGE's tokens keep none (Cyrillic, Chinese): every prediction scores 0."""
    return any(map(str.isalpha, reference)) and not tokenize(reference, None)


def format_unscorable(count: int, split: str) -> str:
    """The warning that goes with `count` such references of a split."""
    return (
        f"warning: {count} references of {split} have letters, but none of a to z, and no digit: ROUGE knows no other, "
        "and scores every summary 0 against them."
    )


def _a_sentence_a_line(text: str) -> str:
    return "\n".join(sentences(text))
