"""Hyper-parameters: what a trial is given, what it counts by, and a study that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.__main__ import main
from train.config import ConfigError, RunConfig, SearchConfig
from train.search import checked_ranges, format_search, search
from train.trainer import SummarizationTrainer

from .conftest import make_config
from .test_denoising import toml

# alembic and SQLAlchemy say what will change in later versions of their own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::optuna.exceptions.ExperimentalWarning")

RANGES = {
    "learning_rate": [1e-4, 1e-2],
    "new_weights_learning_rate": [1e-4, 1e-2],
    "warmup_steps": [0, 2],
    "label_smoothing": [0.0, 0.2],
}


@pytest.fixture
def tiny(base: Path, data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def config(**sections: Any) -> RunConfig:
        return make_config(base, data, tmp_path / "run", optim={"epochs": 1.0}, search=RANGES, **sections)

    return config


def test_each_trial_trains_with_the_values_it_was_given(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    created = SummarizationTrainer.create_optimizer

    def create(self: SummarizationTrainer, model: Any = None) -> Any:
        optimizer = created(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        rates: dict[bool, set[float]] = {True: set(), False: set()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates["crossattention" in names[id(parameter)]].add(group["lr"])
        (new,) = rates[True]
        assert new in rates[False]  # the LM head is new, too
        (warm,) = rates[False] - {new}
        seen.append({"learning_rate": warm, "new_weights_learning_rate": new, "warmup_steps": self.args.warmup_steps})
        return optimizer

    monkeypatch.setattr(SummarizationTrainer, "create_optimizer", create)
    result = search(tiny(), trials=2)
    assert len(result["trials"]) == len(seen) == 2
    for trial, used in zip(result["trials"], seen, strict=True):
        assert {key: trial["values"][key] for key in used} == pytest.approx(used)
    assert seen[0] != seen[1]


def test_a_study_in_a_file_goes_on_and_draws_on(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    config, storage = tiny(), str(tmp_path / "study.sqlite3")
    first = search(config, trials=1, storage=storage)
    second = search(config, trials=2, storage=storage)
    assert second["trials"][0] == first["trials"][0]
    assert len(second["trials"]) == 2
    assert second["trials"][1]["values"] != first["trials"][0]["values"]
    # All ran: nothing is left to do.
    assert search(config, trials=2, storage=storage)["trials"] == second["trials"]
    best = max(second["trials"], key=lambda trial: trial["value"])
    assert (second["value"], second["best"]) == (best["value"], best["values"])


def test_a_trial_counts_by_its_best_evaluation(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 9.0, 7.0, 8.0, 3.0, 4.0])

    def rouge(*_: Any) -> dict[str, float]:
        return {"rouge1": 0.0, "rouge2": next(scores), "rougeL": 0.0}

    monkeypatch.setattr("train.trainer.rouge", rouge)
    result = search(tiny(eval={"rows": 2, "every_steps": 2}), trials=2)
    # Two evaluations in four steps.
    assert [trial["value"] for trial in result["trials"]] == [9.0, 8.0]


def test_a_search_keeps_no_checkpoint_and_writes_what_it_found(
    tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(toml(json.loads(json.dumps(tiny().to_dict()))), encoding="utf-8")
    assert main(["search", "--config", str(path), "--trials", "1"]) == 0
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    found = json.loads((tmp_path / "run" / "search.json").read_text(encoding="utf-8"))
    assert set(found["best"]) == set(RANGES)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("best: optim.")
    assert f"optim.learning_rate={found['best']['learning_rate']:.6g}" in last


def test_the_table_begins_with_the_best() -> None:
    trials = [
        {"number": 0, "state": "COMPLETE", "value": 3.0, "values": {"learning_rate": 1e-4}},
        {"number": 1, "state": "PRUNED", "value": 4.0, "values": {"learning_rate": 2e-4}},
        {"number": 2, "state": "FAIL", "value": None, "values": {}},
    ]
    result = {"ranges": {"learning_rate": (1e-5, 1e-3)}, "trials": trials, "best": {"learning_rate": 1e-4}}
    lines = format_search(result).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["1", "0", "2"]
    assert lines[1].endswith("pruned")
    assert lines[-1] == "best: optim.learning_rate=0.0001"


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({}, r"\[search\] names no range; it may have learning_rate"),
        (
            {"learning_rate": (1e-3, 1e-4)},
            r"search\.learning_rate must be \[lowest, highest\], above 0; it is \[0\.001",
        ),
        ({"learning_rate": (0.0, 1e-4)}, "above 0"),
        ({"warmup_steps": (-1, 4)}, "at least 0"),
    ],
)
def test_ranges_that_are_none_are_refused(ranges: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_ranges(SearchConfig(**ranges))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"denoising": {"path": "texts"}}, "a search has no first stage"),
        ({"data": {"streaming": True}, "eval": {"every_steps": 2}}, "data.streaming does not keep them"),
    ],
)
def test_what_a_search_cannot_do_is_said(
    base: Path, data: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    config = make_config(base, data, tmp_path, search=RANGES, optim={"max_steps": 4}, **sections)
    with pytest.raises(ConfigError, match=message):
        search(config, trials=1)


def test_a_missing_library_is_named_with_its_remedy(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.search.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'precis\[search\]'"):
        search(tiny(), trials=1)
