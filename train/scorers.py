"""Metrics that need a model of their own, by name: `--metric bertscore model=FOLDER layers=5`.

Knows how they are found, imported only when asked for, and called. Brings no weights. A metric of your own is named as
`module:Class`; the class is called with the settings as keyword arguments, which are strings.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from train.records import EvaluationError


class Scorer(Protocol):
    """One number a row; greater is better."""

    def score(
        self, predictions: Sequence[str], documents: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """Scores of the predictions, from their documents or their references."""


class BertScore:
    """F1 of BERTScore (Zhang et al. 2020, arXiv:1904.09675) x 100, the mean over references; package `bert-score`.

    Scores of different models, or layers, are different numbers. An empty text scores 0.
    """

    def __init__(self, model: str, layers: str, batch_size: str = "32", device: str = "cpu") -> None:
        package = _import("bert_score", "bertscore", "pip install 'precis[metrics]'")
        self._model = model
        self._scorer = package.BERTScorer(
            model_type=model, num_layers=int(layers), batch_size=int(batch_size), device=device
        )

    def score(
        self, predictions: Sequence[str], documents: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """The documents are not looked at."""
        pairs = [
            (row, prediction, reference)
            for row, (prediction, options) in enumerate(zip(predictions, references, strict=True))
            for reference in options
            if prediction.strip()
        ]
        rows: list[list[float]] = [[] for _ in predictions]
        if pairs:
            try:
                _, _, f1 = self._scorer.score([pair[1] for pair in pairs], [pair[2] for pair in pairs])
            except OverflowError as error:
                raise EvaluationError(
                    f"--metric bertscore: the tokenizer of {self._model} does not say its model_max_length"
                ) from error
            for (row, _, _), value in zip(pairs, f1.tolist(), strict=True):
                rows[row].append(100 * value)
        return [sum(values) / len(values) if values else 0.0 for values in rows]


class AlignScore:
    """AlignScore (Zha et al. 2023, arXiv:2305.16739) of a summary against its document, x 100; package `alignscore`.

    It is not on PyPI under its authors' name (github.com/yuh-zha/AlignScore), and its checkpoint is a pickle, which can
    run code when it is read: take it from nobody but its authors.
    """

    def __init__(self, model: str, checkpoint: str, batch_size: str = "32", device: str = "cpu") -> None:
        package = _import("alignscore", "alignscore", "see github.com/yuh-zha/AlignScore")
        self._scorer = package.AlignScore(
            model=model, batch_size=int(batch_size), device=device, ckpt_path=checkpoint, evaluation_mode="nli_sp"
        )

    def score(
        self, predictions: Sequence[str], documents: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """The references are not looked at."""
        return [100 * float(value) for value in self._scorer.score(contexts=list(documents), claims=list(predictions))]


SCORERS: dict[str, Callable[..., Scorer]] = {"bertscore": BertScore, "alignscore": AlignScore}


def load_scorer(words: Sequence[str]) -> tuple[str, dict[str, str], Scorer]:
    """A metric from the words of the command line: its name, then `key=value`.

    Returns:
        The name, the settings and the metric.

    Raises:
        EvaluationError: no such metric, a package that is not installed, or settings that it does not take.
    """
    name, *rest = words
    settings = dict[str, str]()
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals:
            raise EvaluationError(f"--metric {name}: settings are key=value; it is {word!r}")
        settings[key] = value
    try:
        make: Any = SCORERS[name] if name in SCORERS else _own(name)
        return name, settings, make(**settings)
    except EvaluationError:
        raise
    except (TypeError, ValueError, OSError) as error:
        raise EvaluationError(f"--metric {name}: {error}") from error


def _own(name: str) -> Any:
    if ":" not in name:
        raise EvaluationError(f"there is no metric {name!r}: {', '.join(sorted(SCORERS))}, or your own as module:Class")
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"--metric {name} cannot be imported: {error}") from error


def _import(module: str, metric: str, how: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvaluationError(f"--metric {metric} needs the package {module} ({how}): {error}") from error
