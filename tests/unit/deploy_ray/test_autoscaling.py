"""How many replicas are wanted, from what the engines report."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.ray import autoscaling
from deploy.ray.autoscaling import STAT, EngineQueuePolicy


@dataclass
class Context:
    aggregated_metrics: dict[str, dict[object, float]] | None
    target_num_replicas: int = 4


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [([16.0, 16.0], 2.0), ([48.0], 3.0), ([0.0, 0.0, 8.0], 0.5), ([0.0], 0.0)],
)
def test_replicas_are_wanted_for_all_texts_together(texts: list[float], wanted: float) -> None:
    context = Context({STAT: dict(enumerate(texts))})
    assert EngineQueuePolicy(16.0)(context)[0] == wanted


@pytest.mark.parametrize("metrics", [None, {}, {STAT: {}}, {"another": {"r": 9.0}}])
def test_without_a_report_nothing_changes(metrics: dict[str, dict[object, float]] | None) -> None:
    assert EngineQueuePolicy(16.0)(Context(metrics))[0] == 4


@pytest.mark.parametrize("texts", [0.0, -1.0, float("nan")])
def test_a_target_that_is_none_is_refused(texts: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        EngineQueuePolicy(texts)


def test_the_policy_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(autoscaling.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "typing"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
