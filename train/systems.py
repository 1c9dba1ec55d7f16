"""What a model is held against: baselines without training, and earlier checkpoints on the same rows.

Knows where their texts come from. Does not know how they are scored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.baselines import LEAD, Oracle, lead, random_units
from train.bootstrap import SEED
from train.data import Pair, data_hash
from train.evaluate import Evaluated
from train.records import EvaluationError, read_json
from train.summarise import Summary


@dataclass(frozen=True)
class System:
    """One text a row under a name.

    Attributes:
        summaries: what is known of each, where a model said them here.
        about: where they come from, as plain data.
    """

    name: str
    texts: list[str]
    summaries: list[Summary] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def baselines(pairs: Sequence[Pair]) -> list[System]:
    """Lead, random units (seeded) and the extractive oracle."""
    rng, oracle = random.Random(SEED), Oracle()
    documents = [pair.document for pair in pairs]
    return [
        System(f"lead{LEAD}", [lead(text) for text in documents]),
        System(f"random{LEAD}", [random_units(text, rng) for text in documents], about={"seed": SEED}),
        System("oracle", [oracle(pair.document, pair.references) for pair in pairs]),
    ]


def evaluated_system(evaluated: Evaluated) -> System:
    """A checkpoint that said its summaries of the same rows just now."""
    model = evaluated.facts["model"]
    name = " ".join(str(part) for part in (model["name"], model["version"]) if part)
    kept = ("model", "settings", "seconds", "truncated_sources")
    about = {key: evaluated.facts[key] for key in kept}
    return System(name, evaluated.texts, evaluated.summaries, about)


def rows_system(path: Path, pairs: Sequence[Pair]) -> System:
    """What an earlier `--output` or `report.json` holds for these rows, found by their ids.

    Raises:
        EvaluationError: it is no such file, it lacks a row, or it has two of one id.
    """
    found = read_json(path)
    try:
        model, data = found["model"], found["data"]
        ids = [row["id"] for row in found["rows"]]
        texts = {row["id"]: row["prediction"] for row in found["rows"]}
        name = " ".join(str(part) for part in (model["name"], model.get("version")) if part)
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"{path} is not an evaluation: it lacks {error}") from error
    if len(texts) < len(ids):
        raise EvaluationError(f"{path} has {len(ids)} rows of {len(texts)} ids: a row cannot be told by its id")
    missing = [pair.id for pair in pairs if pair.id not in texts]
    if missing:
        raise EvaluationError(f"{path} lacks {len(missing)} of {len(pairs)} rows, such as {missing[0]}")
    about = {"file": path.name, "model": model, "settings": found.get("settings"), "data": data}
    about["same_data"] = data.get("sha256") == data_hash(pairs)
    return System(name, [texts[pair.id] for pair in pairs], about=about)


def named_apart(systems: Sequence[System]) -> list[System]:
    """The same systems, with a number behind a name that one before has."""
    taken: dict[str, int] = {}
    found = []
    for system in systems:
        taken[system.name] = count = taken.get(system.name, 0) + 1
        name = system.name if count == 1 else f"{system.name} ({count})"
        found.append(System(name, system.texts, system.summaries, system.about))
    return found
