"""Decode settings: what is tried, what is chosen and why, and where the choice is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine import GenerationParams
from train.__main__ import main
from train.config import DataConfig
from train.decoding_search import (
    OPTIONS,
    Trial,
    descend,
    format_pareto,
    freeze,
    params_of,
    pareto,
    search_decoding,
    settings_of,
)
from train.evaluate import evaluate
from train.export import export
from train.records import EvaluationError
from train.summarise import own_params

OWN: dict[str, Any] = {
    "num_beams": 2,
    "length_penalty": 1.0,
    "min_length": 3,
    "max_length": 16,
    "no_repeat_ngram_size": 3,
}


def trial(quality: float, seconds: float, rows: float = 1.0, **settings: Any) -> Trial:
    return Trial({**OWN, **settings}, {}, quality, seconds, 1.0, rows, 1.0, ())


@given(st.integers(1, 8), st.floats(-2, 2), st.integers(2, 20), st.integers(20, 200), st.integers(0, 4))
def test_settings_are_what_generation_config_says(beams: int, penalty: float, low: int, high: int, ngram: int) -> None:
    file = dict(zip(OPTIONS, (beams, penalty, low, high, ngram), strict=True))
    params = GenerationParams.from_generation_config(file)
    assert settings_of(params) == file
    assert params_of(GenerationParams(), file) == params


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_the_front_holds_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    trials = [trial(quality, seconds, num_beams=i + 1) for i, (quality, seconds) in enumerate(points)]
    front = pareto(trials)
    assert bool(front) == bool(trials)
    for one in trials:
        better = [
            other
            for other in front
            if other.quality >= one.quality
            and other.seconds <= one.seconds
            and (other.quality > one.quality or other.seconds < one.seconds)
        ]
        assert (one in front) == (not better)


def test_the_best_mean_wins_and_among_equals_the_cheaper() -> None:
    dear, cheap, poor = trial(30.004, 9, rows=8), trial(30.001, 9.5, rows=2), trial(29.9, 1, rows=1)
    assert max([dear, cheap, poor], key=lambda one: one.rank) is cheap


def test_descent_takes_the_best_of_one_option_then_of_the_next() -> None:
    """Quality falls with the distance from a target, so each option can be chosen by itself."""
    target = {"num_beams": 4, "length_penalty": 2.0, "min_length": 8, "max_length": 64, "no_repeat_ngram_size": 2}
    tried: list[dict[str, Any]] = []

    def try_(settings: dict[str, Any]) -> Trial:
        tried.append(settings)
        return trial(-sum(abs(settings[name] - target[name]) for name in OPTIONS), 1.0, **settings)

    candidates: dict[str, list[Any]] = {
        "num_beams": [1, 2, 4],
        "length_penalty": [1.0, 2.0],
        "min_length": [0, 8, 99],
        "max_length": [16, 64],
        "no_repeat_ngram_size": [0, 2, 3],
    }
    search: Any = SimpleNamespace(run=try_)
    assert descend(search, try_(OWN), candidates).settings == target
    assert all(settings["min_length"] <= settings["max_length"] for settings in tried)
    assert len({tuple(s.items()) for s in tried}) < 3 * 2 * 3 * 2 * 3


@pytest.fixture(scope="module")
def found(exported: Path, data: Path) -> dict[str, Any]:
    space = {"num_beams": (1, 2, 3), "length_penalty": (0.5, 1.0), "max_length": (8, 24)}
    return search_decoding(exported, DataConfig(path=str(data)), space, grid=True)


def test_a_grid_tries_every_combination_once(found: dict[str, Any]) -> None:
    """3 x 2 x 2, less the length penalties of greedy decoding, and the model's own settings."""
    assert len(found["trials"]) == 12 - 2 + 1
    assert found["own"]["settings"] == OWN
    assert found["trials"][0]["settings"] == OWN


def test_a_trial_scores_what_evaluation_scores(found: dict[str, Any], exported: Path, data: Path) -> None:
    expected = evaluate(exported, DataConfig(path=str(data)), "validation")["scores"]["model"]
    for name, value in found["own"]["rouge"].items():
        assert value == pytest.approx(expected[name]["mean"], abs=0.01)


def test_longer_outputs_than_the_models_own_are_tried(exported: Path, data: Path) -> None:
    space = {"num_beams": (1,), "min_length": (20,), "max_length": (24,)}
    longest = search_decoding(exported, DataConfig(path=str(data)), space, rows=2, grid=True)["trials"][-1]
    assert longest["settings"]["min_length"] > OWN["max_length"]
    assert 19 <= longest["steps"] <= 23


def test_rows_are_beams_times_steps(found: dict[str, Any]) -> None:
    for one in found["trials"]:
        assert one["decoder_rows"] == pytest.approx(one["settings"]["num_beams"] * one["steps"], abs=1e-3)
        assert one["seconds"] > 0


def test_the_choice_is_the_rules(found: dict[str, Any]) -> None:
    best = max(found["trials"], key=lambda one: (round(one["quality"], 2), -one["decoder_rows"]))
    assert found["chosen"]["settings"] == best["settings"]
    gain = best["quality"] - found["own"]["quality"]
    assert found["difference"]["mean"] == pytest.approx(gain, abs=0.02)


def test_the_table_has_a_line_a_trial_and_marks_the_choice(found: dict[str, Any]) -> None:
    lines = format_pareto(found).splitlines()
    assert len(lines) == 1 + len(found["trials"]) + 2
    marks = [line[:3] for line in lines[1:-2]]
    assert sum(">" in mark for mark in marks) == sum("=" in mark for mark in marks) == 1
    assert sum("*" in mark for mark in marks) == sum(one["pareto"] for one in found["trials"])


def test_frozen_settings_are_exported_and_stand_on_the_card(run: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "best" / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "max_new_tokens": 9}), encoding="utf-8")
    words = ["search-decoding", "--model", str(copy), "--rows", "3", "--freeze", "--output", str(tmp_path / "o.json")]
    lists = ["--num-beams", "3", "--length-penalty", "1", "--min-length", "0", "--max-length", "12"]
    assert main([*words, *lists, "--no-repeat-ngram-size", "2"]) == 0
    result = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    chosen = result["chosen"]["settings"]
    assert settings_of(own_params(copy / "best")) == chosen
    # What the search does not touch stays.
    frozen = json.loads(file.read_text(encoding="utf-8"))
    assert {k: v for k, v in frozen.items() if k not in OPTIONS} == {
        k: v for k, v in settings.items() if k not in OPTIONS
    }
    entry = export(copy, tmp_path / "store", "1.0.0", parity_rows=2)
    assert settings_of(own_params(entry)) == chosen
    card = (entry / "README.md").read_text(encoding="utf-8")
    assert f"Decoding: {chosen['num_beams']} beams" in card
    assert f"writes at most {chosen['max_length'] - 1}" in card


def test_an_exported_entry_is_not_changed(
    exported: Path, data: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (exported / "generation_config.json").read_bytes()
    with pytest.raises(EvaluationError, match="is an exported entry"):
        freeze(exported, found)
    words = ["search-decoding", "--model", str(exported), "--data", str(data), "--freeze"]
    assert main(words) == 2
    assert "settings tried" not in capsys.readouterr().err  # said before the work, not after
    assert (exported / "generation_config.json").read_bytes() == before


def test_progress_is_said_after_each_trial(exported: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search_decoding(exported, DataConfig(path=str(data)), {"num_beams": (1, 2)}, rows=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines if "settings tried" in line] == ["1", "2"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"beams": (1,)}, "beams is not an option to search"),
        ({"num_beams": (0,)}, "num_beams must be at least 1; it is 0"),
        ({"max_length": (1,)}, "max_new_tokens must be at least 1; it is 0"),
        ({"max_length": (65, 66)}, r"max_length 66 .* at most 64"),
    ],
)
def test_what_cannot_be_tried_is_refused_at_once(
    exported: Path, data: Path, space: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        search_decoding(exported, DataConfig(path=str(data)), space)


def test_a_row_alone_decides_nothing(exported: Path, data: Path) -> None:
    with pytest.raises(EvaluationError, match="at least two rows"):
        search_decoding(exported, DataConfig(path=str(data)), {}, rows=1)


def test_own_settings_without_a_minimum_come_back_as_none() -> None:
    assert settings_of(replace(GenerationParams(), min_new_tokens=0))["min_length"] == 0
