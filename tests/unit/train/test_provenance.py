"""Where a model's weights come from, however its folder says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.config import config_from_dict
from train.provenance import sources, sources_of

RESTRICTED = {"name": "Talk", "licence": "CC BY-NC-SA 4.0", "non_commercial": True}
FINE_TUNED = {**RESTRICTED, "use": "fine-tuning"}


def record(folder: Path, name: str, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", {"data": {**RESTRICTED, "sources": [FINE_TUNED]}}),
        ("manifest.json", {"data": RESTRICTED}),
        ("run.json", {"sources": [FINE_TUNED]}),
        ("run.json", {"config": {"data": RESTRICTED}}),
    ],
    ids=["an exported entry", "one of before sources were kept", "a run", "a run of before"],
)
def test_what_may_not_be_sold_stays_so_through_another_run(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    record(tmp_path, file, content)
    config = config_from_dict({"name": "next", "model": {"init_from": str(tmp_path)}, "data": {"name": "Free"}})
    first, second = sources(config)
    assert first == {**RESTRICTED, "use": "an earlier run (fine-tuning)"}
    assert (second["name"], second["non_commercial"]) == ("Free", False)


def test_a_checkpoint_has_the_sources_of_its_run(tmp_path: Path) -> None:
    record(tmp_path / "best", "run.json", {"sources": [FINE_TUNED]})
    (tmp_path / "checkpoint-8").mkdir()
    assert sources_of(tmp_path / "checkpoint-8") == [FINE_TUNED]


def test_a_folder_without_a_record_is_named_as_unknown(tmp_path: Path) -> None:
    (source,) = sources_of(tmp_path)
    assert (source["name"], source["licence"]) == (tmp_path.name, "unknown")
