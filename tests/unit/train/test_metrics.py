"""ROUGE against published outputs, and the three ways to use several references."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from rouge_score.tokenizers import DefaultTokenizer

from train.metrics import ALL_ROUGE_TYPES, LineTokenizer, References, is_unscorable, rouge, rouge_rows

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the check data are not at {DATA}")


@needs_data
def test_bart_large_on_dialogsum_scores_what_is_known() -> None:
    with lzma.open(DATA / "rouge_check" / "dialogsum-bart-large.txt.xz", "rt", encoding="utf-8") as file:
        predictions = file.readlines()
    with lzma.open(DATA / "dialogsum" / "test.jsonl.xz", "rt", encoding="utf-8") as file:
        references = [json.loads(line)["references"] for line in file]
    scores = rouge([line.strip() for line in predictions], references, use="first")
    assert scores == pytest.approx({"rouge1": 45.91, "rouge2": 21.32, "rougeL": 38.71}, abs=0.005)


@pytest.mark.parametrize(("use", "expected"), [("first", 0.0), ("mean", 50.0), ("best", 100.0)])
def test_several_references(use: References, expected: float) -> None:
    assert rouge(["cats sleep"], [["dogs bark", "a cat slept", "cats sleep"][::2]], use)["rouge1"] == expected


def test_words_are_stemmed() -> None:
    assert rouge(["she runs"], [["she running"]])["rouge1"] == 100.0


def test_rows_and_references_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        rouge_rows(["a"], [["a"], ["b"]])


@pytest.mark.slow
@needs_data
def test_convs2s_on_xsum_scores_what_is_known() -> None:
    def lines(name: str) -> list[str]:
        with lzma.open(DATA / "rouge_check" / name, "rt", encoding="utf-8") as file:
            return [line.strip() for line in file]

    references = [[line] for line in lines("xsum-gold.txt.xz")]
    scores = rouge(lines("xsum-convs2s.txt.xz"), references, types=ALL_ROUGE_TYPES)
    assert scores["rouge1"] == pytest.approx(30.94, abs=0.01)
    assert scores["rouge2"] == pytest.approx(11.02, abs=0.01)
    assert scores["rougeL"] == pytest.approx(25.05, abs=0.01)
    # A summary of one sentence has nothing to cut.
    assert scores["rougeLsum"] == pytest.approx(scores["rougeL"], abs=0.01)


def test_rouge_lsum_does_not_mind_the_order_of_sentences_and_rouge_l_does() -> None:
    said, reference = "A dog barks. The cat sleeps.", "The cat sleeps. A dog barks."
    scores = rouge([said], [[reference]], types=ALL_ROUGE_TYPES)
    assert scores["rougeLsum"] == 100.0
    assert scores["rougeL"] == 50.0
    # Sentences a line are the same sentences.
    assert rouge([said.replace(". ", ".\n")], [[reference]], types=ALL_ROUGE_TYPES) == scores


def test_remembered_lines_have_the_tokens_of_rouge_score() -> None:
    text = "She's running, 3rd time!\n#Person1#: Caf\u00e9s\n\nco-operate"
    assert LineTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440.", True),
        ("\u4f60\u597d", True),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, Tom.", False),
        ("\u4f60\u597d 3", False),
        ("cats", False),
        ("...", False),
    ],
)
def test_a_reference_is_unscorable_if_rouge_keeps_nothing_of_its_letters(reference: str, expected: bool) -> None:
    assert is_unscorable(reference) is expected
    if expected:
        assert rouge([reference], [[reference]])["rouge1"] == 0.0
