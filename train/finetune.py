"""Fine-tune a warm-started encoder-decoder: `python -m train finetune --config FILE [key=value ...]`.

Knows the course of a run and what it leaves behind. Does not export: `train export` does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from train.config import RunConfig
from train.data import data_hash, format_preflight, preflight, read_splits
from train.trainer import build_trainer
from train.warm_start import warm_start

BEST = "best"


def finetune(config: RunConfig, resume: bool = False) -> Path:
    """Train, keep the checkpoint with the best ROUGE-2 on validation, and save it to `output_dir/best`.

    Args:
        resume: go on from the newest checkpoint in `output_dir`; weights, optimiser, schedule and random state.

    Returns:
        The folder of the best model: safetensors, tokenizer, and `run.json` (settings, data hashes, log).
    """
    set_seed(config.optim.seed)
    start = warm_start(config.model, config.generation)
    splits, reports = preflight(read_splits(config.data), start.tokenizer, config.data)
    print(format_preflight(reports, config.data), flush=True)
    trainer = build_trainer(start, splits["train"], splits["validation"], config)
    checkpoint = get_last_checkpoint(config.output_dir) if resume and Path(config.output_dir).is_dir() else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    best = Path(config.output_dir) / BEST
    trainer.save_model(str(best))
    (best / "run.json").write_text(
        json.dumps(
            {
                "config": config.to_dict(),
                "data": {name: {"rows": len(pairs), "sha256": data_hash(pairs)} for name, pairs in splits.items()},
                "preflight": {name: dataclasses.asdict(report) for name, report in reports.items()},
                "train": result.metrics,
                "best_metric": trainer.state.best_metric,
                "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
                "log": trainer.state.log_history,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    return best
