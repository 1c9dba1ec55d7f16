"""Fine-tune a warm-started encoder-decoder: `python -m train finetune --config FILE [key=value ...]`.

Knows the course of a run and what it leaves behind. Does not export: `train export` does. Under `torchrun` or
`accelerate launch` every process runs this; the first one writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from train.config import ConfigError, RunConfig, config_from_dict
from train.data import SPLITS, data_hash, format_preflight, preflight, read_splits
from train.optimization import slow_attention
from train.sharding import take_launchers_wish
from train.streaming import StreamedBatches
from train.trainer import STEP, build_trainer
from train.warm_start import fit_limits, warm_start

BEST = "best"


def finetune(config: RunConfig, resume: bool = False) -> Path:
    """Train, keep the checkpoint with the best ROUGE-2 on validation, and save it to `output_dir/best`.

    Args:
        resume: go on from the newest checkpoint in `output_dir`; weights, optimiser, schedule and random state. Another
            number of processes accumulates more or fewer batches, so that a step stays what it was.

    Returns:
        The folder of the best model: safetensors, tokenizer, and `run.json` (settings, data hashes, log).
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = with_parallel(config, "fsdp" if take_launchers_wish() else "ddp")
    checkpoint = get_last_checkpoint(config.output_dir) if resume and Path(config.output_dir).is_dir() else None
    if checkpoint is not None:
        config = with_same_step(config, Path(checkpoint), processes)
    set_seed(config.optim.seed)
    start = warm_start(config.model, config.generation)
    fit_limits(start.model, config.data)
    for reason in slow_attention(start.model):
        warnings.warn(reason, stacklevel=2)
    in_memory = [split for split in SPLITS if split != "train" or not config.data.streaming]
    splits, reports = preflight(read_splits(config.data, in_memory), start.tokenizer, config.data)
    trainer = build_trainer(start, splits.get("train", []), splits["validation"], config, held_out=splits)
    if trainer.is_world_process_zero():
        print(format_preflight(reports, config.data), flush=True)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    best = Path(config.output_dir) / BEST
    trainer.save_model(str(best))
    if trainer.is_world_process_zero():
        record: dict[str, Any] = {
            "config": config.to_dict(),
            "processes": processes,
            "data": {name: {"rows": len(pairs), "sha256": data_hash(pairs)} for name, pairs in splits.items()},
            "preflight": {name: dataclasses.asdict(report) for name, report in reports.items()},
            "train": result.metrics,
            "best_metric": trainer.state.best_metric,
            "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
            "log": trainer.state.log_history,
        }
        if isinstance(trainer.train_dataset, StreamedBatches):
            record["data"]["train"] = trainer.train_dataset.used()
            record["preflight"]["train"] = trainer.train_dataset.found()
        (best / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    # Nobody reads `best` before it is complete.
    trainer.accelerator.wait_for_everyone()
    return best


def with_parallel(config: RunConfig, auto: str) -> RunConfig:
    """The run with `optim.parallel` decided: a launcher's wish counts where the settings say nothing."""
    if config.optim.parallel != "auto":
        return config
    table = config.to_dict()
    table["optim"]["parallel"] = auto
    return config_from_dict(table)


def with_same_step(config: RunConfig, checkpoint: Path, processes: int) -> RunConfig:
    """The run as it must be to go on from `checkpoint`: as many batches a step as before.

    Raises:
        ConfigError: batches of another size, or more processes than a step has batches, or not a divisor of them.
    """
    path = checkpoint / STEP
    if not path.is_file():
        return config
    step = json.loads(path.read_text(encoding="utf-8"))
    for name in ("batch_size", "batch_tokens", "grouping", "seed"):
        now = getattr(config.optim, name)
        if step[name] != now:
            raise ConfigError(f"{checkpoint} was trained with optim.{name} = {step[name]}; this run says {now}")
    accumulation, left = divmod(step["batches"], processes)
    if left or not accumulation:
        raise ConfigError(
            f"{checkpoint} was trained with {step['batches']} batches a step, which {processes} processes cannot share "
            "evenly; use a number of processes that divides it"
        )
    if accumulation != config.optim.gradient_accumulation and os.environ.get("RANK", "0") == "0":
        print(f"optim.gradient_accumulation is {accumulation}, for {step['batches']} batches a step", flush=True)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, gradient_accumulation=accumulation))
