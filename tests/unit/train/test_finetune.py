"""What the loss, the steps and the checkpoints of fine-tuning must keep true."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainerControl, set_seed

import train.trainer
from train.arguments import training_arguments
from train.config import ConfigError
from train.data import read_splits, tokenise
from train.finetune import finetune
from train.generation import generate_summaries
from train.optimization import build_optimizer, smoothed_cross_entropy
from train.resuming import STEP, newest_checkpoint, with_same_step
from train.trainer import build_trainer, in_order_of_rows
from train.warm_start import warm_start

from .conftest import PAD, make_config, make_pairs, write_split
from .steps import PAIRS, assert_same_steps, steps


def test_overfits_16_examples_and_generates_them(base: Path, data: Path, tmp_path: Path) -> None:
    """A decoder that saw its answer would have a low loss and generate noise."""
    config = make_config(
        base, data, tmp_path, optim={"learning_rate": 4e-3, "new_weights_learning_rate": 4e-3, "weight_decay": 0.0}
    )
    start = warm_start(config.model, config.generation)
    pairs = make_pairs(16, seed=7)
    rows = [dict(row) for row in tokenise(pairs, start.tokenizer, config.data)]
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


def test_accumulating_four_batches_equals_one(base: Path, data: Path, tmp_path: Path) -> None:
    whole = steps(base, data, tmp_path / "one", batch_size=4)
    parts = steps(base, data, tmp_path / "four", batch_size=1, gradient_accumulation=4)
    assert_same_steps(parts, whole, base)


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
def test_accumulation_keeps_the_scale_of_the_models_own_loss_too(base: Path, data: Path, tmp_path: Path) -> None:
    whole = steps(base, data, tmp_path / "one", batch_size=4, models_loss=True)
    parts = steps(base, data, tmp_path / "four", batch_size=1, gradient_accumulation=4, models_loss=True)
    assert_same_steps(parts, whole, base)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_tokens": 80, "gradient_accumulation": 2},
        {"batch_size": 1, "gradient_accumulation": 4, "grouping": "none"},
        {"batch_size": 4, "gradient_checkpointing": True},
        {"batch_size": 4, "fused_adamw": False},
        # eager: the graph is captured, and nothing is compiled.
        {"batch_size": 4, "torch_compile": True, "compile_backend": "eager"},
    ],
    ids=["tokens", "ungrouped", "checkpointing", "unfused", "compiled"],
)
def test_no_setting_for_speed_or_memory_changes_a_step(
    base: Path, data: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = steps(base, data, tmp_path / "one", batch_size=4)
    assert_same_steps(steps(base, data, tmp_path / "other", **settings), whole, base)


def test_padding_to_the_limits_changes_no_step(base: Path, data: Path, tmp_path: Path) -> None:
    whole = steps(base, data, tmp_path / "one", batch_size=4)
    assert_same_steps(steps(base, data, tmp_path / "other", batch_size=4, padding="max_length"), whole, base)


def test_a_streamed_step_is_the_same_step(base: Path, data: Path, tmp_path: Path) -> None:
    whole = steps(base, data, tmp_path / "one", batch_size=4)
    write_split(tmp_path / "rows", "train", PAIRS[:4])
    streamed = steps(base, tmp_path / "rows", tmp_path / "other", batch_size=4, streaming=True)
    assert_same_steps(streamed, whole, base)


def test_bfloat16_keeps_masters_and_optimiser_in_float32(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path, optim={"precision": "bf16", "max_steps": 1})
    start = warm_start(config.model, config.generation)
    seen: list[torch.dtype] = []
    query = start.model.encoder.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    trainer = build_trainer(start, PAIRS[:4], PAIRS[:2], config)
    trainer.train()
    assert torch.bfloat16 in seen
    tensors = [*start.model.parameters(), *(state["exp_avg"] for state in trainer.optimizer.state.values())]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without CUDA")
def test_float16_without_cuda_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        training_arguments(make_config(base, data, tmp_path, optim={"precision": "fp16"}))


def test_a_folder_with_an_earlier_run_is_refused_and_resuming_it_keeps_its_cost(
    run: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(ConfigError, match="checkpoint-4, checkpoint-8, best of an earlier run: --resume goes on"):
        finetune(make_config(base, data, copy))
    step = json.loads((copy / "checkpoint-8" / STEP).read_text(encoding="utf-8"))
    assert step["seconds"] > 0
    (copy / "checkpoint-8" / STEP).write_text(json.dumps(step | {"seconds": 1000.0}), encoding="utf-8")
    record = json.loads((finetune(make_config(base, data, copy), resume=True) / "run.json").read_text(encoding="utf-8"))
    assert 1000 < record["train"]["train_runtime"] < 1100


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newest_checkpoint(str(run)) == run / "checkpoint-8"
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoint-8" / "trainer_state.json").write_text("{", encoding="utf-8")
    assert newest_checkpoint(str(copy)) == copy / "checkpoint-4"
    assert "checkpoint-8 was not written to its end" in capsys.readouterr().err
    shutil.rmtree(copy / "checkpoint-4")
    assert newest_checkpoint(str(copy)) is None


def test_the_checkpoint_with_the_best_rouge_2_is_kept(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the last nor the first, nor the best by another score."""
    scores = iter([(9.0, 1.0), (5.0, 3.0), (7.0, 2.0)])

    def rouge(*_: object) -> dict[str, float]:
        first, second = next(scores)
        return {"rouge1": first, "rouge2": second, "rougeL": first}

    monkeypatch.setattr(train.trainer, "rouge", rouge)
    settings: dict[str, Any] = {"optim": {"epochs": 3.0}, "eval": {"save_total_limit": 3}}
    best = finetune(make_config(base, data, tmp_path, **settings))
    record = json.loads((best / "run.json").read_text(encoding="utf-8"))
    assert (record["best_checkpoint"], record["best_metric"]) == ("checkpoint-8", 3.0)
    kept, second = (load_file(folder / "model.safetensors") for folder in (best, tmp_path / "checkpoint-8"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_summaries_of_several_processes_come_back_in_the_order_of_rows(processes: int) -> None:
    rows = [f"row {i}" for i in range(7)]
    gathered = [text for rank in range(processes) for text in rows[rank::processes]]
    assert in_order_of_rows(gathered, processes) == rows


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


def test_a_run_that_stops_inside_an_epoch_goes_on_where_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    """In the second epoch, whose order is not the first one's; by tokens, with accumulation."""
    settings: dict[str, Any] = {
        "optim": {"batch_tokens": 80, "gradient_accumulation": 2, "epochs": 2.0},
        "eval": {"every_steps": 1, "save_total_limit": 99},
    }
    straight = make_config(base, data, tmp_path / "straight", **settings)
    finetune(straight)
    last = len(list((tmp_path / "straight").glob("checkpoint-*")))
    stopped = last // 2 + 1  # a step into the second epoch
    kept = tmp_path / "resumed" / f"checkpoint-{stopped}"
    shutil.copytree(tmp_path / "straight" / kept.name, kept)
    finetune(make_config(base, data, tmp_path / "resumed", **settings), resume=True)
    assert not (tmp_path / "resumed" / f"checkpoint-{stopped - 1}").exists()
    expected, found = (
        load_file(tmp_path / name / f"checkpoint-{last}" / "model.safetensors") for name in ("straight", "resumed")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"batch_size": 8}, 1, r"optim.batch_size = 4; this run says 8"),
        ({"batch_tokens": 100}, 1, r"optim.batch_tokens = None"),
        ({"learning_rate": 1e-6}, 1, r"optim.learning_rate = 0.01; this run says 1e-06"),
        ({}, 3, "2 batches a step, which 3 processes cannot share"),
        ({}, 4, "2 batches a step, which 4 processes cannot share"),
    ],
)
def test_a_run_that_cannot_go_on_with_the_same_steps_is_refused(
    base: Path, data: Path, tmp_path: Path, settings: dict[str, Any], processes: int, message: str
) -> None:
    before = asdict(make_config(base, data, tmp_path, optim={"learning_rate": 0.01, "epochs": 9.0}).optim)
    step = {"batches": 2, "batch_size": 4, "batch_tokens": None, "grouping": "length", "seed": 13, "optim": before}
    (tmp_path / STEP).write_text(json.dumps(step), encoding="utf-8")
    settings = {"learning_rate": 0.01, **settings}
    with pytest.raises(ConfigError, match=message):
        with_same_step(make_config(base, data, tmp_path, optim=settings), tmp_path, processes)


def test_another_padding_is_another_batch_where_tokens_are_counted(base: Path, data: Path, tmp_path: Path) -> None:
    optim: dict[str, Any] = {"batch_tokens": 90, "max_steps": 1}
    finetune(make_config(base, data, tmp_path, optim=optim, eval={"every_steps": 1}))
    checkpoint = tmp_path / "checkpoint-1"
    with_same_step(make_config(base, data, tmp_path, optim=optim), checkpoint, 1)
    other = make_config(base, data, tmp_path, optim=optim, data={"pad_to_multiple_of": 8})
    with pytest.raises(ConfigError, match=r"padded to \{'multiple': 1, 'limits': None\}"):
        with_same_step(other, checkpoint, 1)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1)])
def test_another_number_of_processes_accumulates_as_many_batches_more_or_fewer(
    base: Path, data: Path, tmp_path: Path, processes: int, accumulation: int
) -> None:
    step = {"batches": 2, "batch_size": 4, "batch_tokens": None, "grouping": "length", "seed": 13}
    (tmp_path / STEP).write_text(json.dumps(step), encoding="utf-8")
    config = with_same_step(make_config(base, data, tmp_path), tmp_path, processes)
    assert config.optim.gradient_accumulation == accumulation


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
