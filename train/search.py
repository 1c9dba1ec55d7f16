"""Hyper-parameters chosen by Optuna through the Trainer: `python -m train search --config FILE --trials N`.

Knows the ranges of `[search]`, the trials and their study. Does not know how a trial trains: it is a run like any
other, that keeps no checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from train.config import ConfigError, RunConfig, SearchConfig
from train.finetune import prepare, with_parallel
from train.r_drop import loss_of
from train.sharding import take_launchers_wish
from train.trackers import check_tracker
from train.trainer import build_trainer
from train.warm_start import fit_limits, starting_point

LOGARITHMIC = ("learning_rate", "new_weights_learning_rate")
OBJECTIVE = "eval_rouge2"


def search(config: RunConfig, trials: int, storage: str | None = None) -> dict[str, Any]:
    """Run trials until the study has `trials` that ended, and write what was found to `output_dir/search.json`.

    A trial counts by the best ROUGE-2 of its evaluations, as a run keeps its best checkpoint. One that is behind the
    median of the others is cut short. All start from the same weights and see the same rows in the same order.

    Args:
        trials: of the whole study, with those that `storage` holds already.
        storage: a file (or a URL that Optuna takes) that keeps the study, so that it can go on; None keeps none.

    Returns:
        `best` (values by setting), `value` (its ROUGE-2), and every trial.

    Raises:
        ConfigError: nothing to search, a range that is none, or Optuna is missing.
    """
    check_tracker(config.report_to)
    config = with_parallel(config, "fsdp" if take_launchers_wish() else "ddp")
    ranges = checked_ranges(config.search)
    if trials < 1:
        raise ConfigError(f"--trials must be at least 1; it is {trials}")
    if config.optim.parallel == "fsdp":
        raise ConfigError("a search builds its model anew for each trial; optim.parallel = fsdp cannot, ddp can")
    if config.denoising.path is not None:
        raise ConfigError(
            "a search has no first stage: run `train denoise`, then set model.init_from to its best and leave "
            "denoising.path out"
        )
    if config.data.streaming:
        raise ConfigError("a search trains over and over on the same rows; data.streaming does not keep them")
    if find_spec("optuna") is None:
        raise ConfigError("optuna is not installed: pip install 'precis[search]'")
    import optuna

    name = config.name
    where: Any = optuna.storages.InMemoryStorage()
    if storage is not None:
        where = storage
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            where = f"sqlite:///{storage}"
    study = optuna.create_study(study_name=name, storage=where, direction="maximize", load_if_exists=True)
    ended = sum(trial.state.is_finished() for trial in study.trials)
    ready = prepare(config)
    trainer = build_trainer(ready.start, ready.splits["train"], ready.splits["validation"], config)
    trainer.args.save_strategy, trainer.args.load_best_model_at_end = "no", False
    best_of_trial = -1.0

    def model_init() -> torch.nn.Module:
        trainer.start = starting_point(trainer.config)
        fit_limits(trainer.start.model, trainer.config.data)
        return trainer.start.model

    def space(trial: Any) -> dict[str, Any]:
        nonlocal best_of_trial
        best_of_trial = -1.0
        values = {key: suggest(trial, key, low, high) for key, (low, high) in ranges.items()}
        # The optimiser and the loss are ours; the schedule is the Trainer's, by its arguments.
        trainer.config = replace(config, optim=replace(config.optim, **values))
        trainer.compute_loss_func = loss_of(trainer.config.optim)
        return {key: values[key] for key in ("learning_rate", "warmup_steps") if key in values}

    def objective(metrics: dict[str, float]) -> float:
        nonlocal best_of_trial
        best_of_trial = max(best_of_trial, metrics[OBJECTIVE])
        return best_of_trial

    trainer.model_init = model_init
    if trials > ended:
        trainer.hyperparameter_search(
            hp_space=space,
            compute_objective=objective,
            n_trials=trials - ended,
            direction="maximize",
            backend="optuna",
            study_name=name,
            storage=where,
            load_if_exists=True,
            # The same seed again would draw the same first trials again.
            sampler=optuna.samplers.TPESampler(seed=config.optim.seed + ended),
            pruner=optuna.pruners.MedianPruner(),
        )
    best = study.best_trial
    result = {
        "objective": f"best {OBJECTIVE} of a trial, {len(trainer.eval_pairs)} rows of validation",
        "ranges": ranges,
        "value": best.value,
        "best": best.params,
        "trials": [
            {"number": trial.number, "state": trial.state.name, "value": trial.value, "values": trial.params}
            for trial in study.trials
        ],
        "config": asdict(config),
    }
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def checked_ranges(config: SearchConfig) -> dict[str, tuple[float, float]]:
    """The ranges that are set.

    Raises:
        ConfigError: none is, the ends are the wrong way round, or a logarithmic one holds zero.
    """
    ranges = {key: value for key, value in asdict(config).items() if value is not None}
    if not ranges:
        raise ConfigError(f"[search] names no range; it may have {', '.join(asdict(config))}")
    for key, (low, high) in ranges.items():
        least = "above 0" if key in LOGARITHMIC else "at least 0"
        if high < low or low < 0 or (low == 0 and key in LOGARITHMIC):
            raise ConfigError(f"search.{key} must be [lowest, highest], {least}; it is [{low}, {high}]")
    return ranges


def suggest(trial: Any, key: str, low: float, high: float) -> Any:
    """A value of the range, from the study's sampler."""
    if isinstance(low, int):
        return trial.suggest_int(key, low, high)
    return trial.suggest_float(key, low, high, log=key in LOGARITHMIC)


def format_search(result: dict[str, Any]) -> str:
    """Trials from the best on, and the words that give a run the best one's settings."""
    keys = list(result["ranges"])
    lines = [f"{'trial':>5}{'ROUGE-2':>9}  " + "".join(f"{key:>27}" for key in keys)]
    for trial in sorted(result["trials"], key=lambda trial: -(trial["value"] or -1)):
        value = "-" if trial["value"] is None else f"{trial['value']:.2f}"
        cells = "".join(f"{trial['values'].get(key, '-'):>27.6g}" for key in keys if key in trial["values"])
        note = "" if trial["state"] == "COMPLETE" else f"  {trial['state'].lower()}"
        lines.append(f"{trial['number']:>5}{value:>9}  {cells}{note}")
    lines.append("best: " + " ".join(f"optim.{key}={value:.6g}" for key, value in result["best"].items()))
    return "\n".join(lines)
