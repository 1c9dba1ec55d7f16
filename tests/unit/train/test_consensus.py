"""One of several summaries: what rouge_score would choose, among equals the first, and one candidate as it is."""

from __future__ import annotations

import random

import numpy as np
import pytest

from train.consensus import Choice, agreement
from train.metrics import rouge_rows


def test_it_is_the_candidate_with_the_greatest_mean_rouge_against_all() -> None:
    generator = random.Random(0)
    words = ["dogs", "run", "running", "home", "now", "a", "the"]
    for _ in range(50):
        candidates = [" ".join(generator.choices(words, k=generator.randint(2, 8))) for _ in range(6)]
        scores = []
        for candidate in candidates:
            rows = rouge_rows([candidate] * 6, [[other] for other in candidates], types=("rouge1", "rouge2"))
            scores.append(sum(rows["rouge1"]) + sum(rows["rouge2"]))
        chosen = candidates.index(Choice().consensus(candidates))
        assert scores[chosen] == pytest.approx(max(scores))


def test_what_is_said_twice_counts_twice() -> None:
    assert Choice().consensus(["a b", "c d", "c d"]) == "c d"


def test_among_equals_it_is_the_first() -> None:
    assert Choice().consensus(["x y", "a b"]) == "x y"


def test_a_single_candidate_is_chosen_whatever_it_says() -> None:
    assert Choice().consensus([""]) == ""
    with pytest.raises(ValueError, match="at least one"):
        Choice().consensus([])


def test_the_nearest_is_judged_by_the_texts_given_alone() -> None:
    assert Choice().nearest(["a b", "a b", "c d e"], ["d e f"]) == "c d e"
    with pytest.raises(ValueError, match="at least one"):
        Choice().nearest(["a"], [])


def test_repeated_words_agree_as_often_as_both_have_them() -> None:
    said = [["a", "a"], ["a"]]
    found = agreement(said, said)
    np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, (2 / 3 + 1) / 2])
