"""Which data went into a model's weights, over all its stages: for the licence of the result.

Knows settings and records of runs. Does not know how data are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.config import RunConfig


def sources(config: RunConfig) -> list[dict[str, Any]]:
    """One entry a data set: `name`, `licence`, `non_commercial` and `use`, those of earlier runs first.

    An earlier run is `model.init_from`, and the model whose summaries an extra set or a file of candidates holds
    (`teacher.json` beside it).
    """
    found: list[dict[str, Any]] = []
    if config.model.init_from is not None:
        found += [_used(source, "an earlier run") for source in sources_of(Path(config.model.init_from))]
    denoising = config.denoising
    if denoising.path is not None:
        found.append(_entry(denoising, "denoising"))
    if config.data.weight > 0:
        found.append(_entry(config.data, "fine-tuning"))
    for file in config.ranking.paths:
        unknown = {
            "name": Path(file).name,
            "licence": "unknown",
            "non_commercial": False,
            "use": "summaries to be ranked",
        }
        ranked = _of_record(Path(file).parent / TEACHER, "the model whose summaries were ranked") or [unknown]
        found += [source for source in ranked if source not in found]
    for extra in config.data.extra:
        path = Path(extra.path)
        found += _of_record((path if path.is_dir() else path.parent) / TEACHER, "the teacher of an extra set")
        found.append(_entry(extra, "fine-tuning, as an extra set"))
    return found


def sources_of(folder: Path) -> list[dict[str, Any]]:
    """The sources of a model's weights, as its manifest, its run, or the run of a checkpoint says."""
    if (folder / "manifest.json").exists():
        data = _read(folder / "manifest.json")["data"]
        own = {**{key: data[key] for key in ("name", "licence", "non_commercial")}, "use": "fine-tuning"}
        return list(data.get("sources", [own]))
    for path in (folder / "run.json", folder.parent / "best" / "run.json"):
        if path.exists():
            record = _read(path)
            data = record.get("config", {}).get("data", {})
            own = {**{key: data.get(key) for key in ("name", "licence", "non_commercial")}, "use": "fine-tuning"}
            return list(record.get("sources", [own]))
    return [{"name": folder.name, "licence": "unknown", "non_commercial": False, "use": "training that left no record"}]


def sources_of_all(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The sources of several models' weights, each once."""
    found: list[dict[str, Any]] = []
    for folder in folders:
        found += [source for source in sources_of(folder) if source not in found]
    return found


def _entry(settings: Any, use: str) -> dict[str, Any]:
    kept = {key: getattr(settings, key) for key in ("name", "licence", "non_commercial")}
    return {**kept, "use": use}


TEACHER = "teacher.json"


def _of_record(path: Path, use: str) -> list[dict[str, Any]]:
    """The sources that an earlier record names; nothing where there is none."""
    if not path.exists():
        return []
    return [_used(source, use) for source in _read(path).get("sources", [])]


def _used(source: dict[str, Any], use: str) -> dict[str, Any]:
    return {**source, "use": f"{use} ({source['use']})"}


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
