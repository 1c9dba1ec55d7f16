"""A step or two of plain SGD through the whole trainer, in one process or several, to compare weights afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from train.sharding import full_weights
from train.trainer import build_trainer
from train.warm_start import warm_start

from .conftest import make_config, make_pairs

PAIRS = make_pairs(9, seed=3)
Weights = dict[str, torch.Tensor]


def steps(
    base: Path,
    data: Path,
    output_dir: Path,
    rows: int = 4,
    count: int = 1,
    models_loss: bool = False,
    streaming: bool = False,
    padding: str = "longest",
    **optim: Any,
) -> Weights:
    """Weights after `count` steps of plain SGD over the first `rows` pairs (Adam would hide a gradient's scale).

    With the model's own loss, a mean over each batch, all summaries have the same length.
    """
    config = make_config(
        base,
        data,
        output_dir,
        data={"streaming": streaming, "padding": padding},
        optim={"epochs": 1.0, "max_grad_norm": 1e9, **({"max_steps": count} if streaming else {}), **optim},
        eval={"every_steps": 100} if streaming else {},
    )
    set_seed(5)  # the new weights
    start = warm_start(config.model, config.generation)
    pairs = PAIRS[:rows]
    if models_loss:
        pairs = [replace(pair, references=(" ".join(pair.document.split()[:3]),)) for pair in pairs]
    trainer = build_trainer(start, pairs, make_pairs(2, seed=4), config)
    if models_loss:
        trainer.compute_loss_func = None
    trainer.optimizer = torch.optim.SGD(start.model.parameters(), lr=0.5)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert trainer.state.global_step == count
    return {name: tensor.detach().clone() for name, tensor in full_weights(start.model).items()}


def assert_same_steps(found: Weights, expected: Weights, base: Path) -> None:
    """The two moved alike: they differ by less than a thousandth of the way."""
    config = make_config(base, base, base)
    set_seed(5)
    before = warm_start(config.model, config.generation).model.state_dict()
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    apart = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert moved > 1e-2
    assert apart < 1e-3 * moved
