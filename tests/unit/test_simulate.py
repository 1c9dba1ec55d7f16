"""What is read out of a measured run, and that the model meets the run that is committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import simulate

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*-ray-serve.md"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two texts of 0.2 and 0.4 s; four together are answered twice as fast as one after the other."""
    results: dict[str, Any] = {
        "bytes": [400, 800],
        "alone": [{"engine_s": engine, "caller_s": engine + 0.01} for engine in (0.2, 0.4)],
        "closed": [
            {"replicas": 1, "callers": 1, "answers_per_second": 3.2},
            {"replicas": 1, "callers": 4, "answers_per_second": 6.5},
            {"replicas": 1, "callers": 32, "answers_per_second": 8.0},
            {"replicas": 2, "callers": 2, "answers_per_second": 4.0},
            {"replicas": 2, "callers": 64, "answers_per_second": 12.0},
        ],
        "open": [],
    }
    path = tmp_path / "result.md"
    path.write_text(f"# Title\n\n```json\n{json.dumps(results)}\n```\n", encoding="utf-8")
    return path


def test_the_speed_of_a_batch_comes_from_the_closed_loops_of_one_replica(file: Path) -> None:
    measured = simulate.read(file)
    assert measured.works == [0.2, 0.4]
    assert measured.overhead == pytest.approx(0.01)
    # answers a second, times the 0.3 s that one takes alone
    assert measured.speeds == {1: 1.0, 4: pytest.approx(1.95), simulate.SLOTS: pytest.approx(2.4)}
    assert measured.full_rate == pytest.approx(8.0)


def test_what_two_replicas_cost_each_other_comes_from_the_closed_loops_of_two(file: Path) -> None:
    assert simulate.read(file).shares == {1: pytest.approx(4.0 / 6.4), simulate.SLOTS: pytest.approx(12.0 / 16.0)}


def test_a_file_without_a_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.md"
    path.write_text("# Nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no result"):
        simulate.read(path)


@pytest.mark.parametrize("result", COMMITTED, ids=lambda path: path.stem)
def test_the_model_meets_the_committed_run(result: Path) -> None:
    measured = simulate.read(result)
    assert measured.opened
    for run in measured.opened:
        for real, model in simulate.check(measured, run)["pairs"]:
            assert model == pytest.approx(real, rel=simulate.TOLERANCE)
