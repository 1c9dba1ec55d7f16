"""From which checkpoint a run goes on, and what must be as it was.

A checkpoint has `step.json` beside what the Trainer writes: how large a step was, how it was taken, and the seconds so
far. Knows folders and settings. Does not know weights or data.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.arguments import batch_plan
from train.batching import BatchPlan
from train.config import ConfigError, OptimConfig, RunConfig
from train.records import BEST

STEP = "step.json"
_STATE = "trainer_state.json"  # the last thing that the Trainer itself writes
_OF_A_STEP = ("batch_size", "batch_tokens", "grouping", "seed")
# Of `[optim]`: what may be another when a run goes on. How long it is, and how the same step is computed.
MAY_CHANGE = {
    "epochs",
    "max_steps",
    "gradient_accumulation",
    "precision",
    "fused_adamw",
    "gradient_checkpointing",
    "torch_compile",
    "compile_backend",
    "loader_workers",
    "parallel",
}


def check_unused(output_dir: str) -> None:
    """Let a folder pass in which no run has left anything.

    Raises:
        ConfigError: it has checkpoints or a best model, which would be mixed with those of the new run.
    """
    found = sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))
    found += [BEST] if (Path(output_dir) / BEST).exists() else []
    if found:
        raise ConfigError(
            f"{output_dir} holds {', '.join(found)} of an earlier run: --resume goes on with it, and another "
            "output_dir, or the folder moved away, begins anew"
        )


def newest_checkpoint(output_dir: str) -> Path | None:
    """The last checkpoint that was written to its end; one that was not is named on stderr."""
    found = {int(match[1]): path for path in Path(output_dir).glob("checkpoint-*") if (match := _NUMBERED(path.name))}
    for step in sorted(found, reverse=True):
        try:
            json.loads((found[step] / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            print(f"{found[step]} was not written to its end: it is passed over", file=sys.stderr, flush=True)
        else:
            return found[step]
    return None


def step_record(optim: OptimConfig, plan: BatchPlan, seconds: float) -> dict[str, Any]:
    """What `step.json` holds."""
    return {
        "batches": plan.per_step,
        "batch_size": plan.rows,
        "batch_tokens": plan.tokens,
        "grouping": "length" if plan.grouped else "none",
        "seed": plan.seed,
        "padding": _padding(plan),
        "optim": asdict(optim),
        "seconds": round(seconds, 1),
    }


def seconds_of(checkpoint: Path | None) -> float:
    """How long the run had taken at a checkpoint; 0 where that is not known."""
    path = None if checkpoint is None else checkpoint / STEP
    if path is None or not path.is_file():
        return 0.0
    return float(json.loads(path.read_text(encoding="utf-8")).get("seconds", 0.0))


def with_same_step(config: RunConfig, checkpoint: Path, processes: int) -> RunConfig:
    """The run as it must be to go on from `checkpoint`: as many batches a step as before.

    Raises:
        ConfigError: steps of another size or taken otherwise, or more processes than a step has batches, or not a
            divisor of them.
    """
    path = checkpoint / STEP
    if not path.is_file():
        return config
    step = json.loads(path.read_text(encoding="utf-8"))
    before = step.get("optim", {}) | {name: step[name] for name in _OF_A_STEP}
    for name, value in before.items():
        now = getattr(config.optim, name, value)
        if value != now and name not in MAY_CHANGE:
            raise ConfigError(
                f"{checkpoint} was trained with optim.{name} = {value}; this run says {now}. A run with other settings "
                "may begin at its weights: model.init_from"
            )
    padding = _padding(batch_plan(config, processes))
    if config.optim.batch_tokens is not None and step.get("padding", padding) != padding:
        raise ConfigError(
            f"{checkpoint} was trained with batches padded to {step['padding']}, which optim.batch_tokens counts; by "
            f"data.padding and data.pad_to_multiple_of this run pads to {padding}"
        )
    accumulation, left = divmod(step["batches"], processes)
    if left or not accumulation:
        raise ConfigError(
            f"{checkpoint} was trained with {step['batches']} batches a step, which {processes} processes cannot share "
            "evenly; use a number of processes that divides it"
        )
    if accumulation != config.optim.gradient_accumulation and os.environ.get("RANK", "0") == "0":
        print(f"optim.gradient_accumulation is {accumulation}, for {step['batches']} batches a step", flush=True)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, gradient_accumulation=accumulation))


def _padding(plan: BatchPlan) -> dict[str, Any]:
    """As JSON has it."""
    padding: dict[str, Any] = json.loads(json.dumps(asdict(plan.padding)))
    return padding


_NUMBERED = re.compile(r"checkpoint-(\d+)").fullmatch
