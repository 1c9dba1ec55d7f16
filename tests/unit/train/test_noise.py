"""What noise may take away and what it must keep."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.noise import infill, permute, split_sentences

MASK = -1
shares = st.floats(0, 1)
seeds = st.integers(0, 2**32)


@given(st.text(alphabet="ab.!?\"') \n", max_size=60))
def test_joined_sentences_are_the_text(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ('He said "no." Then 3.5 more.', ['He said "no."', " Then 3.5 more."]),
        ("#P1#: Hi\n#P2#: Yes. Bye.", ["#P1#: Hi", "\n#P2#: Yes.", " Bye."]),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_sentences_end_at_full_stops_and_line_breaks(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=8), seeds)
def test_permutation_keeps_every_sentence_whole(sentences: list[list[int]], seed: int) -> None:
    permuted = permute(sentences, np.random.default_rng(seed))
    assert Counter(map(tuple, permuted)) == Counter(map(tuple, sentences))


@given(st.integers(0, 80), shares, st.floats(1, 8), seeds)
def test_infilling_loses_no_token_but_those_behind_a_mask(count: int, share: float, mean: float, seed: int) -> None:
    noised = infill(range(count), MASK, np.random.default_rng(seed), share, mean)
    kept = [token for token in noised if token != MASK]
    assert kept == sorted(set(kept))  # in their order, each once
    assert count - len(kept) == math.ceil(share * count)
    # Wherever tokens are missing, a mask says so.
    last = -1
    masked = False
    for token in [*noised, count]:
        if token == MASK:
            masked = True
            continue
        assert masked or token == last + 1
        last, masked = token, False


@given(st.integers(0, 40), seeds)
def test_the_same_generator_gives_the_same_noise(count: int, seed: int) -> None:
    first, second = (infill(range(count), MASK, np.random.default_rng(seed)) for _ in range(2))
    assert first == second


def test_nothing_is_masked_where_the_share_is_zero() -> None:
    assert infill(range(30), MASK, np.random.default_rng(0), share=0) == list(range(30))


def test_all_masked_is_masks_alone() -> None:
    assert set(infill(range(30), MASK, np.random.default_rng(0), share=1)) == {MASK}


def test_spans_have_the_mean_that_is_asked_for() -> None:
    noised = infill(range(100_000), MASK, np.random.default_rng(1), share=0.3, mean_span=3.0)
    assert 30_000 / noised.count(MASK) == pytest.approx(3.0, abs=0.1)


def test_spans_without_tokens_are_as_frequent_as_poisson_says() -> None:
    """A mask between two neighbours stands for nothing: exp(-3) of the spans, less those that touch another one."""
    noised = infill(range(200_000), MASK, np.random.default_rng(2), share=0.1, mean_span=3.0)
    around = zip(noised, noised[1:], noised[2:], strict=False)
    empty = sum(b == MASK and a != MASK and c == a + 1 for a, b, c in around)
    assert empty / noised.count(MASK) == pytest.approx(math.exp(-3), abs=0.01)


def test_every_place_but_the_ends_is_masked_alike() -> None:
    """The first token can be behind a mask only as the first of its span, so it is so less often."""
    count, draws = 60, 4000
    seen = np.zeros(count)
    for seed in range(draws):
        for token in infill(range(count), MASK, np.random.default_rng(seed), share=0.3):
            seen[token] += token != MASK
    assert (seen / draws)[8:-8].tolist() == pytest.approx([0.7] * (count - 16), abs=0.04)
