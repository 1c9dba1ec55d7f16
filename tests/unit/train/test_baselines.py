"""Lead, random units, and the oracle that has seen the answer."""

from __future__ import annotations

import itertools
import json
import lzma
import random

import pytest

from train.baselines import Oracle, lead, random_units
from train.metrics import rouge, rouge_rows
from train.units import joined, units

from .test_metrics import DATA, needs_data

DIALOGUE = "#A#: The cat sleeps.\n#B#: Yes.\n#A#: A dog barks at me.\n#B#: No.\n#A#: Birds sing."


@needs_data
def test_lead_on_dialogsum_scores_what_is_known() -> None:
    with lzma.open(DATA / "dialogsum" / "test.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    scores = rouge([lead(row["document"]) for row in rows], [row["references"] for row in rows])
    assert scores == pytest.approx({"rouge1": 27.5, "rouge2": 7.2, "rougeL": 21.1}, abs=0.1)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            "#P1#: Hi. You? Me. Us.\n#P2#: Yes.\n\n#P1#: So.\n#P2#: Bye.",
            "#P1#: Hi. You? Me. Us.\n#P2#: Yes.\n#P1#: So.",
        ),
        ("One. Two! Three? Four.", "One. Two! Three?"),
        ("One is\nhere. Two.\nThree. Four.", "One is here. Two. Three."),
        ("Only one sentence", "Only one sentence"),
        ("Note: this is prose. Two. Three. Four.", "Note: this is prose. Two. Three."),
    ],
)
def test_lead_takes_turns_of_a_dialogue_and_sentences_of_prose(document: str, expected: str) -> None:
    assert lead(document) == expected


def test_random_units_are_of_the_document_in_its_order_and_the_same_for_a_seed() -> None:
    drawn = [random_units(DIALOGUE, random.Random(seed)) for seed in range(20)]
    assert drawn == [random_units(DIALOGUE, random.Random(seed)) for seed in range(20)]
    assert len(set(drawn)) > 5
    for text in drawn:
        places = [units(DIALOGUE).index(line) for line in text.splitlines()]
        assert places == sorted(places)
        assert len(set(places)) == 3
    assert random_units("Only one. Two.", random.Random(0)) == "Only one. Two."


def test_the_oracle_finds_what_the_reference_copies() -> None:
    assert Oracle()(DIALOGUE, ["A dog barks. Birds sing."]) == "#A#: A dog barks at me.\n#A#: Birds sing."


def test_the_oracle_is_never_below_any_lead_random_or_single_unit_on_its_own_measure() -> None:
    rng = random.Random(3)
    oracle = Oracle()
    for _ in range(40):
        words = [f"w{rng.randrange(12)}" for _ in range(30)]
        document = " ".join(word + "." * (rng.random() < 0.3) for word in words)
        references = [" ".join(rng.choices(words, k=6)) for _ in range(2)]
        best = oracle.measure(oracle(document, references), references)
        others = [lead(document), random_units(document, rng), *units(document)]
        assert best >= max(oracle.measure(text, references) for text in others)


def test_where_greedy_search_ends_below_the_lead_the_oracle_takes_the_lead() -> None:
    oracle = Oracle()
    document, references = "b a. c. y e e. c a d.", ["a c e"]
    assert oracle.greedy(document, references) == "b a. c a d."
    assert oracle(document, references) == lead(document) == "b a. c. y e e."
    assert oracle.measure("b a. c. y e e.", references) > oracle.measure("b a. c a d.", references)


def test_the_oracle_measures_what_rouge_score_does() -> None:
    text, references = "The cats slept. A dog.", ["a cat sleeps", "the dog"]
    rows = rouge_rows([text], [references], "mean")
    assert 100 * Oracle().measure(text, references) == pytest.approx((rows["rouge1"][0] + rows["rouge2"][0]) / 2)


def test_greedy_comes_near_the_best_of_all_extracts() -> None:
    rng = random.Random(5)
    oracle = Oracle()
    for _ in range(5):
        document = " ".join(f"w{rng.randrange(9)} w{rng.randrange(9)}." for _ in range(6))
        references = [" ".join(f"w{rng.randrange(9)}" for _ in range(5))]
        found = units(document)
        extracts = (joined(document, list(chosen)) for n in range(1, 7) for chosen in itertools.combinations(found, n))
        best = max(oracle.measure(text, references) for text in extracts)
        assert oracle.measure(oracle(document, references), references) >= 0.8 * best
