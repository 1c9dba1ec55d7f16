"""Novelty, coverage, density and repetition on cases that can be counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.text_statistics import coverage, density, fragments, novelty, repetition, words

SOURCE = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "on", "the", "rug"]
texts = st.lists(st.sampled_from("abcd"), max_size=12)


def test_words_compare_across_case_accents_and_wordpiece() -> None:
    assert words("#Person1# won't pay 1,000 at the Caf\u00e9!") == words("# person1 # won ' t pay 1, 000 at the cafe!")
    assert words("\u0412\u0441\u0435 \u0434\u043e\u043c\u0430") == ["\u0432\u0441\u0435", "\u0434\u043e\u043c\u0430"]
    assert words("_ - .") == []


def test_coverage_and_density_follow_the_paper() -> None:
    # Fragments: "the dog sat on the" (5), "mat" (1); "happily" is in none.
    summary = ["the", "dog", "sat", "on", "the", "mat", "happily"]
    assert fragments(summary, SOURCE) == [5, 1]
    assert coverage(summary, SOURCE) == pytest.approx(6 / 7)
    assert density(summary, SOURCE) == pytest.approx((25 + 1) / 7)


def test_a_copy_has_one_fragment_and_a_text_of_new_words_none() -> None:
    assert (coverage(SOURCE, SOURCE), density(SOURCE, SOURCE)) == (1.0, 13.0)
    assert (coverage(["new"], SOURCE), density(["new"], SOURCE)) == (0.0, 0.0)


def test_an_empty_text_has_no_shares() -> None:
    assert coverage([], SOURCE) is density([], SOURCE) is novelty([], SOURCE, 1) is repetition([]) is None


@given(texts, texts)
def test_fragments_are_the_words_that_are_not_new(summary: list[str], source: list[str]) -> None:
    known = sum(word in source for word in summary)
    found = fragments(summary, source)
    assert sum(found) == known
    text = " ".join(source)
    start = 0
    for length in found:
        while summary[start] not in source:
            start += 1
        assert " ".join(summary[start : start + length]) in text
        start += length


def test_novelty_counts_each_occurrence() -> None:
    summary = ["the", "cat", "ran", "and", "the", "cat", "ran"]
    # New words: ran, ran. New pairs: cat ran, ran and, cat ran (the cat, and the, the cat are there).
    assert novelty(summary, SOURCE, 1) == pytest.approx(2 / 7)
    assert novelty(summary, SOURCE, 2) == pytest.approx(3 / 6)
    assert novelty(summary, SOURCE, 3) == 1.0
    assert novelty(summary[:3], SOURCE, 4) is None


def test_repetition_counts_what_was_said_before() -> None:
    # Of five 3-grams "the cat ran" is said twice.
    assert repetition(["the", "cat", "ran", "and", "the", "cat", "ran"]) == pytest.approx(1 / 5)
    assert repetition(["a", "b", "c", "d"]) == 0.0
    assert repetition(["a", "a", "a", "a", "a"]) == pytest.approx(2 / 3)
    assert repetition(["a", "b"]) is None
