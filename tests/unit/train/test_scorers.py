"""Metrics by name: found when they are asked for, and a clear word when they are not there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from train.records import EvaluationError
from train.scorers import AlignScore, BertScore, load_scorer


class Longer:
    """A metric of somebody's own: words of the text, times `factor`."""

    def __init__(self, factor: str = "1") -> None:
        self.factor = int(factor)

    def score(
        self, predictions: Sequence[str], documents: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        return [self.factor * float(len(text.split())) for text in predictions]


def test_a_metric_of_ones_own_is_named_by_its_module() -> None:
    name, settings, scorer = load_scorer([f"{__name__}:Longer", "factor=3"])
    assert (name, settings) == (f"{__name__}:Longer", {"factor": "3"})
    assert scorer.score(["a b", ""], ["", ""], [["a"], ["b"]]) == [6.0, 0.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rouge9"], "there is no metric 'rouge9': alignscore, bertscore"),
        (["no_such_module:Class"], "cannot be imported"),
        (["json:Nothing"], "cannot be imported"),
        ([f"{__name__}:Longer", "factor"], "key=value; it is 'factor'"),
        ([f"{__name__}:Longer", "size=2"], "unexpected keyword argument 'size'"),
        ([f"{__name__}:Longer", "factor=x"], "invalid literal"),
    ],
)
def test_what_is_wrong_with_a_metric_is_said(words: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_scorer(words)


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["bertscore", "model=x", "layers=1"], "bert_score"),
        (["alignscore", "model=roberta-base", "checkpoint=x"], "alignscore"),
    ],
)
def test_a_missing_package_is_named(words: list[str], module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EvaluationError, match=f"needs the package {module}"):
        load_scorer(words)


def test_bert_score_of_equal_texts_is_100_and_of_an_empty_one_0(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bert_score", reason="the extra `metrics` is not installed")
    with pytest.raises(EvaluationError, match="does not say its model_max_length"):
        load_scorer(["bertscore", f"model={base}", "layers=2"])[2].score(["w1"], [""], [["w1"]])
    model = shutil.copytree(base, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(model)
    _, _, scorer = load_scorer(["bertscore", f"model={model}", "layers=2"])
    assert isinstance(scorer, BertScore)
    same, mean, empty = scorer.score(["w1 w2", "w1 w2", ""], ["", "", ""], [["w1 w2"], ["w1 w2", "w40 w7"], ["w1"]])
    (other,) = scorer.score(["w1 w2"], [""], [["w40 w7"]])
    assert same == pytest.approx(100, abs=1e-3)
    assert other < 99
    assert mean == pytest.approx((same + other) / 2, abs=1e-3)
    assert empty == 0.0


def test_align_score_compares_with_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, **settings: Any) -> None:
            assert settings == {
                "model": "roberta-base",
                "batch_size": 32,
                "device": "cpu",
                "ckpt_path": "x.ckpt",
                "evaluation_mode": "nli_sp",
            }

        def score(self, contexts: list[str], claims: list[str]) -> list[float]:
            return [float(claim in context) for context, claim in zip(contexts, claims, strict=True)]

    package = ModuleType("alignscore")
    package.AlignScore = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "alignscore", package)
    _, _, scorer = load_scorer(["alignscore", "model=roberta-base", "checkpoint=x.ckpt"])
    assert isinstance(scorer, AlignScore)
    assert scorer.score(["a", "z"], ["a b", "a b"], [["q"], ["q"]]) == [100.0, 0.0]
