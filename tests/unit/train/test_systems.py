"""What a model is held against, and earlier rows found by their ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.baselines import lead
from train.data import Pair, data_hash
from train.records import EvaluationError
from train.systems import System, baselines, named_apart, rows_system

PAIRS = [Pair(f"r{i}", f"One {i}. Two {i}. Three {i}. Four {i}. Five {i}.", (f"four {i} five {i}",)) for i in range(6)]


def write_rows(path: Path, rows: list[dict[str, Any]], sha256: str = "other") -> Path:
    found = {"model": {"name": "old", "version": "0.1.0"}, "data": {"sha256": sha256}, "rows": rows}
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def test_baselines_have_a_text_a_row_and_are_the_same_again() -> None:
    leads, drawn, oracle = baselines(PAIRS)
    assert [leads.name, drawn.name, oracle.name] == ["lead3", "random3", "oracle"]
    assert leads.texts == [lead(pair.document) for pair in PAIRS]
    assert oracle.texts == [f"Four {i}. Five {i}." for i in range(6)]
    assert drawn.texts == baselines(PAIRS)[1].texts
    assert drawn.texts != leads.texts
    assert len({tuple(text.split()[::2]) for text in drawn.texts}) > 1  # not the same places in each row


def test_earlier_rows_are_found_by_id_whatever_their_order(tmp_path: Path) -> None:
    rows = [{"id": pair.id, "prediction": f"text of {pair.id}"} for pair in [*PAIRS[::-1], Pair("more", "x", ("y",))]]
    found = rows_system(write_rows(tmp_path / "old.json", rows), PAIRS)
    assert found.name == "old 0.1.0"
    assert found.texts == [f"text of {pair.id}" for pair in PAIRS]
    assert found.about["same_data"] is False
    same = write_rows(tmp_path / "same.json", rows, data_hash(PAIRS))
    assert rows_system(same, PAIRS).about["same_data"] is True


def test_earlier_rows_that_do_not_cover_the_data_are_refused(tmp_path: Path) -> None:
    rows = [{"id": pair.id, "prediction": ""} for pair in PAIRS]
    with pytest.raises(EvaluationError, match="lacks 2 of 6 rows, such as r4"):
        rows_system(write_rows(tmp_path / "few.json", rows[:4]), PAIRS)
    with pytest.raises(EvaluationError, match="7 rows of 6 ids"):
        rows_system(write_rows(tmp_path / "twice.json", [*rows, rows[0]]), PAIRS)
    (tmp_path / "else.json").write_text('{"model": {}}', encoding="utf-8")
    with pytest.raises(EvaluationError, match="not an evaluation: it lacks 'data'"):
        rows_system(tmp_path / "else.json", PAIRS)


def test_two_systems_of_one_name_are_told_apart() -> None:
    found = named_apart([System("a", []), System("b", []), System("a", [])])
    assert [system.name for system in found] == ["a", "b", "a (2)"]
