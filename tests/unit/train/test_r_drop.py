"""R-Drop: half of the paper's sum, nothing where dropout is off, and the same steps as ever at weight 0."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.config import OptimConfig
from train.finetune import finetune
from train.optimization import smoothed_cross_entropy
from train.r_drop import loss_of, twice, with_r_drop

from .conftest import make_config

LABELS = torch.tensor([[1, 2, -100], [3, -100, -100]])


def test_the_loss_is_half_of_the_papers_sum() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    outputs: Any = SimpleNamespace(logits=torch.cat([first, second]))
    found = with_r_drop(smoothed_cross_entropy(0.0), alpha=0.7)(outputs, torch.cat([LABELS, LABELS]))

    kept = LABELS != -100
    p, q = first[kept].log_softmax(-1), second[kept].log_softmax(-1)
    nll = sum(torch.nn.functional.nll_loss(x, LABELS[kept], reduction="sum") for x in (p, q))
    kl = torch.nn.functional.kl_div
    divergence = kl(q, p, log_target=True, reduction="sum") + kl(p, q, log_target=True, reduction="sum")
    torch.testing.assert_close(found, (nll + 0.7 * divergence / 2) / (2 * kept.sum()))


def test_the_loss_is_over_the_tokens_of_the_accumulated_batch() -> None:
    torch.manual_seed(0)
    outputs: Any = SimpleNamespace(logits=torch.randn(4, 3, 5))
    labels = torch.cat([LABELS, LABELS])
    loss = with_r_drop(smoothed_cross_entropy(0.1), alpha=2.0)
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=12), loss(outputs, labels) / 2)


def test_where_both_passes_agree_it_is_the_plain_loss() -> None:
    logits = torch.randn(2, 3, 5)
    twofold: Any = SimpleNamespace(logits=torch.cat([logits, logits]))
    once: Any = SimpleNamespace(logits=logits)
    found = with_r_drop(smoothed_cross_entropy(0.1), alpha=5.0)(twofold, torch.cat([LABELS, LABELS]))
    torch.testing.assert_close(found, smoothed_cross_entropy(0.1)(once, LABELS))


def test_weight_zero_is_the_plain_loss() -> None:
    outputs: Any = SimpleNamespace(logits=torch.randn(2, 3, 5))
    plain = smoothed_cross_entropy(0.1)(outputs, LABELS)
    torch.testing.assert_close(loss_of(OptimConfig(label_smoothing=0.1))(outputs, LABELS), plain)


def test_a_batch_holds_its_rows_twice_and_leaves_them_as_they_are() -> None:
    rows: Any = [{"x": 1}, {"x": 2}]

    def collate(features: Any) -> list[int]:
        return [feature.pop("x") for feature in features]

    assert twice(collate)(rows) == [1, 2, 1, 2]
    assert rows == [{"x": 1}, {"x": 2}]


def test_a_run_trains_with_it_and_evaluates_without(base: Path, data: Path, tmp_path: Path) -> None:
    """At rate 0 nothing is learnt: losses of the two runs differ by the divergence, in training alone."""
    records = []
    for alpha in (0.0, 1e4):
        folder = tmp_path / str(alpha)
        optim = {"epochs": 1.0, "r_drop_alpha": alpha, "learning_rate": 0.0, "new_weights_learning_rate": 0.0}
        finetune(make_config(base, data, folder, model={"hidden_dropout": 0.3}, optim=optim))
        records.append(json.loads((folder / "best" / "run.json").read_text(encoding="utf-8")))
    plain, with_divergence = records
    eval_losses = [next(e["eval_loss"] for e in record["log"] if "eval_loss" in e) for record in records]
    assert eval_losses[1] == pytest.approx(eval_losses[0], rel=1e-5)
    assert with_divergence["train"]["train_loss"] > 1.1 * plain["train"]["train_loss"]
