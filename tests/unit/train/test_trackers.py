"""Where a run's log goes besides its own file."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.config import ConfigError
from train.finetune import finetune
from train.trackers import check_tracker

from .conftest import make_config


# tensorboard's own code, under the newest protobuf and setuptools.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_loss_and_rouge(base: Path, data: Path, tmp_path: Path) -> None:
    finetune(make_config(base, data, tmp_path, report_to="tensorboard", optim={"epochs": 1.0}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    assert {"eval/loss", "eval/rouge2", "train/train_loss"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("eval/rouge2")] == [4]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_said_before_anything_is_read(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"report_to is {name}, and its package is not installed: pip install"):
        finetune(make_config(base, tmp_path / "no-data", tmp_path, report_to=name))


def test_an_unknown_tracker_is_refused_by_name(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="report_to must be one of none, tensorboard, trackio, wandb; it is 'mlflow'"):
        make_config(base, data, tmp_path, report_to="mlflow")


def test_none_needs_nothing() -> None:
    check_tracker("none")
