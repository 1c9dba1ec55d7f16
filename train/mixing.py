"""Further labelled sets beside a run's own: read, freed of what validation and test hold, and weighed.

Knows rows and weights. Does not know tokens beyond the preflight's counts, nor what the rows are trained for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from train.config import DataConfig, ExtraData
from train.data import DataError, Pair, SplitReport, preflight, read_split
from train.tokenizer_pair import AnyTokenizer


def mix(
    splits: Mapping[str, list[Pair]], tokenizer: AnyTokenizer, config: DataConfig, seed: int
) -> tuple[list[Pair], dict[str, SplitReport]]:
    """The rows of an epoch: those of `splits["train"]` and of every extra set, each as often as its weight says.

    The preflight drops from an extra what stands in validation or test of the run, and repeats within it. A document
    of train may come again with another summary: a pseudo-label, say.

    Args:
        splits: as the preflight left them.

    Returns:
        The rows, and what the preflight found in each extra, by name.

    Raises:
        DataError: an extra cannot be read, a weight is negative, or nothing is left.
    """
    rows = weigh(splits["train"][: config.max_train_rows], config.weight, "data.weight", seed)
    reports: dict[str, SplitReport] = {}
    held_out = {name: pairs for name, pairs in splits.items() if name != "train"}
    for number, extra in enumerate(config.extra):
        found = {"train": read_split(_settings(extra, config), "train"), **held_out}
        kept, report = preflight(found, tokenizer, config)
        named = [replace(pair, id=f"{extra.name}/{pair.id}") for pair in kept["train"]]
        rows += weigh(named, extra.weight, f"data.extra[{number}].weight", seed + 1 + number)
        reports[extra.name] = report["train"]
    if not rows:
        raise DataError("no row to train on: data.weight is 0 and no extra has a row left")
    return rows, reports


def weigh(pairs: Sequence[Pair], weight: float, where: str, seed: int) -> list[Pair]:
    """Every row `weight` times; of a fraction of a time, so large a part of the rows, drawn by `seed`.

    Raises:
        DataError: a weight below zero; `where` names it.
    """
    if weight < 0:
        raise DataError(f"{where} must not be negative; it is {weight}")
    whole, part = divmod(weight, 1)
    drawn = sorted(random.Random(seed).sample(range(len(pairs)), round(part * len(pairs))))
    return [*list(pairs) * int(whole), *(pairs[i] for i in drawn)]


def format_mix(rows: Sequence[Pair], reports: Mapping[str, SplitReport], config: DataConfig) -> list[str]:
    """A sentence an extra set, and how many rows an epoch has; nothing where there is no extra."""
    weights = {extra.name: extra.weight for extra in config.extra}
    lines = []
    for name, report in reports.items():
        leaks = ", ".join(f"{count} of {split}" for split, count in report.leaks.items())
        lines.append(
            f"extra {name}: {report.pairs} rows, {report.pairs - report.dropped} after leaks ({leaks}) and repeats, "
            f"weight {weights[name]:g}"
        )
    return [*lines, f"An epoch has {len(rows)} rows."] if config.extra or config.weight != 1 else []


def _settings(extra: ExtraData, config: DataConfig) -> DataConfig:
    columns = ("source_column", "target_column", "references_column")
    return replace(config, path=extra.path, extra=(), **{name: getattr(extra, name) for name in columns})
