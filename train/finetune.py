"""Fine-tune a warm-started encoder-decoder: `python -m train finetune --config FILE [key=value ...]`.

Knows the course of a run and what it leaves behind. Does not export: `train export` does. Under `torchrun` or
`accelerate launch` every process runs this; the first one writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from train.config import ConfigError, RunConfig, config_from_dict
from train.data import (
    SPLITS,
    Pair,
    SplitReport,
    data_hash,
    document_key,
    format_preflight,
    preflight,
    read_splits,
)
from train.denoising import denoise, stage_config
from train.mixing import format_mix, mix
from train.optimization import slow_attention
from train.provenance import sources
from train.ranking import ranked
from train.records import BEST
from train.resuming import check_unused, newest_checkpoint, seconds_of, with_same_step
from train.sharding import take_launchers_wish
from train.streaming import StreamedBatches
from train.trackers import check_tracker
from train.trainer import build_trainer
from train.warm_start import WarmStart, fit_limits, load_weights, starting_point


def finetune(config: RunConfig, resume: bool = False) -> Path:
    """Train, keep the checkpoint with the best ROUGE-2 on validation, and save it to `output_dir/best`.

    Args:
        resume: go on from the newest checkpoint in `output_dir`; weights, optimiser, schedule and random state. Another
            number of processes accumulates more or fewer batches, so that a step stays what it was.

    Returns:
        The folder of the best model: safetensors, tokenizer, and `run.json` (settings, data hashes, log).

    Raises:
        ConfigError: `output_dir` holds an earlier run, which is not resumed; or that was trained otherwise.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_tracker(config.report_to)
    config = with_parallel(config, "fsdp" if take_launchers_wish() else "ddp")
    if not resume:
        check_unused(config.output_dir)
    checkpoint = newest_checkpoint(config.output_dir) if resume else None
    if checkpoint is not None:
        config = with_same_step(config, checkpoint, processes)
    ready = prepare(config)
    splits, held_out = ready.splits, {name: pairs for name, pairs in ready.splits.items() if name != "train"}
    first = Path(stage_config(config).output_dir) / BEST
    if config.denoising.path is not None and checkpoint is None:
        first = first_stage(config, held_out, resume)
        load_weights(ready.start, first)
    trainer = build_trainer(ready.start, splits.get("train", []), splits["validation"], config, held_out)
    trainer.seconds_before = seconds_of(checkpoint)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best = Path(config.output_dir) / BEST
    trainer.save_model(str(best))
    if trainer.is_world_process_zero():
        record: dict[str, Any] = {
            "config": config.to_dict(),
            "processes": processes,
            "data": {name: {"rows": len(pairs), "sha256": data_hash(pairs)} for name, pairs in splits.items()},
            "preflight": {name: dataclasses.asdict(report) for name, report in ready.reports.items()},
            "extra": {name: dataclasses.asdict(report) for name, report in ready.extra.items()},
            "sources": sources(config),
            "train": result.metrics | {"train_runtime": round(trainer.seconds(), 1)},
            "best_metric": trainer.state.best_metric,
            "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
            "log": trainer.state.log_history,
        }
        if config.ranking.paths:
            record["ranking"] = ranked(trainer.train_dataset, config.ranking)
        if isinstance(trainer.train_dataset, StreamedBatches):
            record["data"]["train"] = trainer.train_dataset.used()
            record["preflight"]["train"] = trainer.train_dataset.found()
        if config.denoising.path is not None and (first / "run.json").exists():
            stage = json.loads((first / "run.json").read_text(encoding="utf-8"))
            record["denoising"] = {key: stage[key] for key in ("texts", "rows", "dropped", "best_metric")}
        (best / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    # Nobody reads `best` before it is complete.
    trainer.accelerator.wait_for_everyone()
    return best


@dataclass(frozen=True)
class Prepared:
    """What a run has before its first step.

    Attributes:
        splits: as they are trained and scored on; train with the extra sets mixed in, or left out if it is streamed.
        reports: the preflight's, of the run's own set.
        extra: the preflight's, of each extra set.
    """

    start: WarmStart
    splits: dict[str, list[Pair]]
    reports: dict[str, SplitReport]
    extra: dict[str, SplitReport]


def prepare(config: RunConfig) -> Prepared:
    """Seed, warm start, and the data after their preflight, which the first process prints.

    Raises:
        ConfigError: `ranking.paths` with several processes, whose gradients its loss would not join.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.ranking.paths and processes > 1:
        raise ConfigError(f"ranking.paths is for runs of one process; there are {processes}")
    set_seed(config.optim.seed)
    start = starting_point(config)
    fit_limits(start.model, config.data)
    for reason in slow_attention(start.model):
        warnings.warn(reason, stacklevel=3)
    in_memory = [split for split in SPLITS if split != "train" or not config.data.streaming]
    splits, reports = preflight(read_splits(config.data, in_memory), start.tokenizer, config.data)
    found = format_preflight(reports, config.data)
    extra: dict[str, SplitReport] = {}
    if not config.data.streaming:
        splits["train"], extra = mix(splits, start.tokenizer, config.data, config.optim.seed)
        found = "\n".join([found, *format_mix(splits["train"], extra, config.data)])
    if int(os.environ.get("RANK", "0")) == 0:
        print(found, flush=True)
    return Prepared(start, splits, reports, extra)


def first_stage(config: RunConfig, held_out: Mapping[str, Sequence[Pair]], resume: bool = False) -> Path:
    """Denoising, into `output_dir/denoising`; one that has ended is not run again if `resume`.

    Args:
        held_out: splits whose documents must not be learnt from.

    Returns:
        The folder of its best model.
    """
    stage = stage_config(config)
    best = Path(stage.output_dir) / BEST
    if resume and (best / "run.json").exists():
        return best
    if not resume:
        check_unused(stage.output_dir)
    checkpoint = newest_checkpoint(stage.output_dir) if resume else None
    if checkpoint is not None:
        stage = with_same_step(stage, checkpoint, int(os.environ.get("WORLD_SIZE", "1")))
    set_seed(stage.optim.seed)
    keys = {document_key(pair.document) for pairs in held_out.values() for pair in pairs}
    start = starting_point(stage)
    fit_limits(start.model, stage.data)
    return denoise(stage, start, keys, checkpoint)


def denoise_only(config: RunConfig, resume: bool = False) -> Path:
    """The first stage of a run by itself; `model.init_from` may name its folder then.

    Raises:
        ConfigError: `denoising.path` is not set.
    """
    if config.denoising.path is None:
        raise ConfigError("denoising.path is not set: there is no text to learn from")
    check_tracker(config.report_to)
    config = with_parallel(config, "fsdp" if take_launchers_wish() else "ddp")
    return first_stage(config, read_splits(config.data, ("validation", "test")), resume)


def with_parallel(config: RunConfig, auto: str) -> RunConfig:
    """The run with `optim.parallel` decided: a launcher's wish counts where the settings say nothing."""
    if config.optim.parallel != "auto":
        return config
    table = config.to_dict()
    table["optim"]["parallel"] = auto
    return config_from_dict(table)
