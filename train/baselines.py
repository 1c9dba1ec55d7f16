"""What takes no training: the first units of a document, random ones, and the best ones for who knows the answer.

Knows documents as units (`train.units`) and the oracle's measure. Does not know any model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from train.metrics import LineTokenizer
from train.units import joined, units

LEAD = 3


def lead(document: str, count: int = LEAD) -> str:
    """The first `count` turns (lines) of a dialogue, or the first `count` sentences of prose."""
    return joined(document, units(document)[:count])


def random_units(document: str, rng: random.Random, count: int = LEAD) -> str:
    """`count` turns or sentences drawn without replacement, in the document's order."""
    found = units(document)
    chosen = sorted(rng.sample(range(len(found)), min(count, len(found))))
    return joined(document, [found[i] for i in chosen])


class Oracle:
    """The turns or sentences that a reader of the references would copy: greedy by ROUGE (Nallapati et al. 2017).

    It takes the unit that raises its measure most, until none does (arXiv:1611.04230). Greedy search may end below the
    lead; then it takes the lead. So it is no upper bound on all extracts, but never below the lead on its own measure:
    the mean over the references of ROUGE-1 and ROUGE-2 (F1), averaged.
    """

    def __init__(self) -> None:
        self._scorer = RougeScorer(["rouge1", "rouge2"], tokenizer=LineTokenizer())

    def __call__(self, document: str, references: Sequence[str]) -> str:
        """The extract, in the document's order."""
        return max(self.greedy(document, references), lead(document), key=lambda text: self.measure(text, references))

    def greedy(self, document: str, references: Sequence[str]) -> str:
        """What greedy search ends with; empty where no unit has a word of the references."""
        found = units(document)
        chosen: list[int] = []
        best, best_score = "", 0.0
        while len(chosen) < len(found):
            options = []
            for i in set(range(len(found))) - set(chosen):
                text = joined(document, [found[j] for j in sorted([*chosen, i])])
                options.append((self.measure(text, references), -i, text))
            score, minus_i, text = max(options)
            if score <= best_score:
                break
            best, best_score = text, score
            chosen.append(-minus_i)
        return best

    def measure(self, text: str, references: Sequence[str]) -> float:
        """From 0 to 1: what the oracle maximises."""
        scores = [self._scorer.score(reference, text) for reference in references]
        return sum(score["rouge1"].fmeasure + score["rouge2"].fmeasure for score in scores) / (2 * len(scores))
