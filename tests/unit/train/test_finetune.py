"""What the loss, the steps and the checkpoints of fine-tuning must keep true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainerControl, set_seed

from train.data import read_splits, tokenise
from train.finetune import finetune
from train.generation import generate_summaries
from train.optimization import build_optimizer, resolve_precision, smoothed_cross_entropy
from train.trainer import build_trainer
from train.warm_start import warm_start

from .conftest import PAD, make_config, make_pairs

ROOT = Path(__file__).parents[3]


def test_overfits_16_examples_and_generates_them(base: Path, data: Path, tmp_path: Path) -> None:
    """A decoder that saw its answer would have a low loss and generate noise."""
    config = make_config(
        base, data, tmp_path, optim={"learning_rate": 4e-3, "new_weights_learning_rate": 4e-3, "weight_decay": 0.0}
    )
    start = warm_start(config.model, config.generation)
    pairs = make_pairs(16, seed=7)
    rows = [dict(row) for row in tokenise(pairs, start.tokenizer, config.data).remove_columns("length")]
    batch = DataCollatorForSeq2Seq(start.tokenizer, model=start.model)(rows)
    start_column = torch.full((16, 1), start.model.config.decoder_start_token_id)
    shifted = torch.cat([start_column, batch["labels"][:, :-1]], 1)
    assert torch.equal(batch["decoder_input_ids"], shifted.masked_fill(shifted == -100, PAD))

    # As Trainer does with a loss of one's own: the labels stay outside.
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    optimizer, loss_of = build_optimizer(start, config.optim), smoothed_cross_entropy(0.0)
    start.model.train()
    for _ in range(300):
        loss = loss_of(start.model(**inputs), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(start.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    start.model.generation_config.min_length = 0
    start.model.generation_config.no_repeat_ngram_size = 0
    written = generate_summaries(
        start.model, start.tokenizer, [pair.document for pair in pairs], batch_size=8, num_beams=1
    )
    assert written == [pair.references[0] for pair in pairs]


def one_step(
    base: Path, data: Path, output_dir: Path, batch_size: int, accumulation: int, models_loss: bool = False
) -> dict[str, torch.Tensor]:
    """Weights after one step of plain SGD over the same four rows (Adam would hide a gradient's scale).

    With the model's own loss, a mean over each batch, all summaries have the same length.
    """
    config = make_config(
        base,
        data,
        output_dir,
        optim={
            "epochs": 1.0,
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "max_grad_norm": 1e9,
        },
    )
    set_seed(5)  # the new weights
    start = warm_start(config.model, config.generation)
    pairs = make_pairs(4, seed=3)
    if models_loss:
        pairs = [replace(pair, references=(" ".join(pair.document.split()[:3]),)) for pair in pairs]
    trainer = build_trainer(start, pairs, make_pairs(2, seed=4), config)
    if models_loss:
        trainer.compute_loss_func = None
    trainer.optimizer = torch.optim.SGD(start.model.parameters(), lr=0.5)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert trainer.state.global_step == 1
    return {name: tensor.detach().clone() for name, tensor in start.model.state_dict().items()}


def assert_same_step(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], base: Path) -> None:
    """The two moved alike: they differ by less than a thousandth of the way."""
    config = make_config(base, base, base)
    set_seed(5)
    before = warm_start(config.model, config.generation).model.state_dict()
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    apart = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert moved > 1e-2
    assert apart < 1e-3 * moved


def test_accumulating_four_batches_equals_one(base: Path, data: Path, tmp_path: Path) -> None:
    whole = one_step(base, data, tmp_path / "one", batch_size=4, accumulation=1)
    assert_same_step(one_step(base, data, tmp_path / "four", batch_size=1, accumulation=4), whole, base)


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
def test_accumulation_keeps_the_scale_of_the_models_own_loss_too(base: Path, data: Path, tmp_path: Path) -> None:
    whole = one_step(base, data, tmp_path / "one", batch_size=4, accumulation=1, models_loss=True)
    parts = one_step(base, data, tmp_path / "four", batch_size=1, accumulation=4, models_loss=True)
    assert_same_step(parts, whole, base)


TWO_PROCESSES = """
import os, sys, torch
from pathlib import Path
from tests.unit.train.test_finetune import one_step
base, data, out = map(Path, sys.argv[1:])
weights = one_step(base, data, out / "run", batch_size=2, accumulation=1)
assert torch.distributed.get_world_size() == 2
if os.environ["RANK"] == "0":
    torch.save(weights, out / "weights.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_equal_one(base: Path, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    words = ["--standalone", "--nproc-per-node", "2", str(script), str(base), str(data), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = one_step(base, data, tmp_path / "one", batch_size=4, accumulation=1)
    assert_same_step(torch.load(tmp_path / "weights.pt"), whole, base)


class StopAfterFirstEpoch(TrainerCallback):
    """What a lost machine does, at a convenient moment."""

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_a_resumed_run_equals_a_straight_one(run: Path, base: Path, data: Path, tmp_path: Path) -> None:
    """With dropout: weights, optimiser, schedule, order of rows and random state all go on where they were."""
    config = make_config(base, data, tmp_path, model={"hidden_dropout": 0.1})

    set_seed(config.optim.seed)
    start = warm_start(config.model, config.generation)
    splits = read_splits(config.data)
    trainer = build_trainer(start, splits["train"], splits["validation"], config)
    trainer.add_callback(StopAfterFirstEpoch())
    trainer.train()
    assert trainer.state.global_step == 4
    finetune(config, resume=True)
    resumed, straight = (load_file(folder / "checkpoint-8" / "model.safetensors") for folder in (tmp_path, run))
    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


def test_a_run_that_may_be_cut_off_saves_between_epochs(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path, optim={"epochs": 1.0}, eval={"every_steps": 3})
    finetune(config)
    assert (tmp_path / "checkpoint-3").is_dir()  # an epoch is 4 steps


def test_run_json_names_settings_and_data(run: Path) -> None:
    record = json.loads((run / "best" / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["name"] == "tiny"
    assert record["data"]["train"]["rows"] == 16
    assert len(record["data"]["validation"]["sha256"]) == 64
    assert any("eval_rouge2" in entry for entry in record["log"])


def test_new_weights_take_the_higher_rate(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path)
    start = warm_start(config.model, config.generation)
    rates: dict[int, float] = {}
    for group in build_optimizer(start, config.optim).param_groups:
        rates.update({id(parameter): group["lr"] for parameter in group["params"]})
    for name, parameter in start.model.named_parameters():
        assert rates[id(parameter)] == (8e-4 if "crossattention" in name or "cls.predictions" in name else 2e-4), name


def test_the_loss_is_a_mean_over_tokens_of_the_whole_accumulated_batch() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [3, -100, -100]])
    outputs = type("Outputs", (), {"logits": logits})
    loss = smoothed_cross_entropy(0.0)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss(outputs, labels), expected)
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=6), expected / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_asked_for_is_kept(precision: str) -> None:
    assert resolve_precision(precision) == precision
