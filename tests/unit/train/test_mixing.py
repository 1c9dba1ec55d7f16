"""Further labelled sets: weights, leaks, and what the run and its card say of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import ConfigError, DataConfig, ExtraData, config_from_dict
from train.data import DataError, read_split, read_splits
from train.export import export
from train.finetune import finetune
from train.mixing import format_mix, mix, weigh
from train.warm_start import load_tokenizer

from .conftest import make_config, make_pairs, write_split


@given(st.integers(0, 30), st.floats(0, 4), st.integers(0, 5))
def test_a_weight_is_how_often_a_row_is_seen(count: int, weight: float, seed: int) -> None:
    pairs = make_pairs(count)
    rows = weigh(pairs, weight, "weight", seed)
    assert rows == weigh(pairs, weight, "weight", seed)
    times = Counter(pair.id for pair in rows)
    whole, part = divmod(weight, 1)
    assert all(times[pair.id] in (int(whole), int(whole) + 1) for pair in pairs)
    assert len(rows) == int(whole) * count + round(part * count)


def test_a_negative_weight_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"data\.weight must not be negative; it is -1"):
        weigh(make_pairs(2), -1, "data.weight", 0)


@pytest.fixture
def extra(tmp_path: Path, data: Path) -> Path:
    """Five rows: one also stands in validation of the run, one in its test, two are the same."""
    own = read_splits(DataConfig(path=str(data)))
    fresh = make_pairs(2, seed=50)
    leaked = [replace(own[split][0], references=("w1 w2",)) for split in ("validation", "test")]
    folder = tmp_path / "extra"
    write_split(folder, "train", [fresh[0], fresh[0], fresh[1], *leaked])
    return folder


def test_what_validation_and_test_hold_is_dropped_from_an_extra(extra: Path, data: Path, base: Path) -> None:
    config = DataConfig(path=str(data), extra=(ExtraData(str(extra), "other", weight=2.0),))
    splits = read_splits(config)
    rows, reports = mix(splits, load_tokenizer(str(base)), config, seed=1)
    assert reports["other"].leaks == {"validation": 1, "test": 1}
    assert reports["other"].dropped == 3
    added = rows[len(splits["train"]) :]
    assert Counter(pair.id for pair in added) == {"other/50_0": 2, "other/50_1": 2}
    text = "\n".join(format_mix(rows, reports, config))
    assert "extra other: 5 rows, 2 after leaks (1 of validation, 1 of test) and repeats, weight 2" in text
    assert "An epoch has 20 rows." in text


def test_a_document_of_train_may_come_again_with_another_summary(data: Path, base: Path, tmp_path: Path) -> None:
    """As pseudo-labels do."""
    config = DataConfig(path=str(data))
    splits = read_splits(config)
    write_split(tmp_path, "train", [replace(pair, references=("w5 w5",)) for pair in splits["train"]])
    config = replace(config, extra=(ExtraData(str(tmp_path / "train.jsonl"), "labels"),))
    rows, _ = mix(splits, load_tokenizer(str(base)), config, seed=1)
    assert len(rows) == 32
    assert rows[16].document == rows[0].document
    assert rows[16].references == ("w5 w5",)


def test_the_run_may_train_on_the_extras_alone(extra: Path, data: Path, base: Path) -> None:
    config = DataConfig(path=str(data), weight=0.0, extra=(ExtraData(str(extra), "other"),))
    rows, _ = mix(read_splits(config), load_tokenizer(str(base)), config, seed=1)
    assert {pair.id for pair in rows} == {"other/50_0", "other/50_1"}
    with pytest.raises(DataError, match="no row to train on"):
        mix(read_splits(config), load_tokenizer(str(base)), replace(config, extra=()), seed=1)


def test_the_bound_on_rows_is_for_the_runs_own(extra: Path, data: Path, base: Path) -> None:
    config = DataConfig(path=str(data), max_train_rows=3, extra=(ExtraData(str(extra), "other"),))
    rows, _ = mix(read_splits(config), load_tokenizer(str(base)), config, seed=1)
    assert len(rows) == 5


def test_a_single_file_has_a_train_split_only(extra: Path) -> None:
    config = DataConfig(path=str(extra / "train.jsonl"))
    assert len(read_split(config, "train")) == 5
    with pytest.raises(DataError):
        read_split(config, "validation")


def test_extras_are_tables_of_the_file_and_survive_the_manifest() -> None:
    table = {"name": "a", "data": {"extra": [{"path": "p", "name": "n", "weight": 2}]}}
    config = config_from_dict(table)
    assert config.data.extra == (ExtraData("p", "n", weight=2.0),)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([{"path": "p"}], r"data\.extra\[0\]\.name is missing"),
        ([{"path": "p", "name": "n", "wait": 1}], r"data\.extra\[0\]\.wait is not a setting"),
        ([3], r"data\.extra\[0\] is a section, not the value 3"),
        (3, r"data\.extra is a list, not the value 3"),
    ],
)
def test_a_wrong_extra_is_refused_by_name(extra: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"name": "a", "data": {"extra": extra}})


def test_run_and_card_name_every_set_and_its_licence(
    extra: Path, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_config(
        base,
        data,
        tmp_path / "first",
        optim={"epochs": 1.0},
        data={
            "licence": "Apache-2.0",
            "non_commercial": False,
            "extra": [{"path": str(extra), "name": "Other", "licence": "CC BY-NC 4.0", "non_commercial": True}],
        },
    )
    best = finetune(first)
    assert "extra Other: 5 rows" in capsys.readouterr().out
    record = json.loads((best / "run.json").read_text(encoding="utf-8"))
    assert record["data"]["train"]["rows"] == 18
    assert record["preflight"]["train"]["pairs"] == 16
    assert record["extra"]["Other"]["dropped"] == 3

    # A run that starts from these weights has their terms, whatever its own data.
    second = make_config(
        base,
        data,
        tmp_path / "second",
        optim={"epochs": 1.0},
        model={"init_from": str(best)},
        data={"licence": "Apache-2.0", "non_commercial": False},
    )
    finetune(second)
    for run in ("first", "second"):
        folder = export(tmp_path / run, tmp_path / f"store-{run}", "1.0.0", parity_rows=1)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "NON-COMMERCIAL USE ONLY" in card
        assert "Other" in card
        assert "CC BY-NC 4.0" in card
        written = card + (folder / "manifest.json").read_text(encoding="utf-8")
        assert str(extra) not in written
        assert str(best) not in written
