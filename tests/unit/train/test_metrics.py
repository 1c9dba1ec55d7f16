"""ROUGE against published outputs, and the three ways to use several references."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from train.metrics import References, rouge, rouge_rows

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
