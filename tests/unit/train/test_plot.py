"""The log of a run, drawn while it runs and afterwards."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from train.__main__ import main
from train.plot import PlotError, panels, read_log, terminal, write_png

LOG = [
    {"step": 20, "loss": 3.0, "grad_norm": 1.5, "learning_rate": 1e-4},
    {"step": 40, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 5e-5},
    {"step": 40, "eval_loss": 2.5, "eval_rouge1": 20.0, "eval_rouge2": 5.0, "eval_rougeL": 18.0},
    {"step": 40, "train_loss": 2.5, "train_runtime": 1.0},
]


def test_each_series_has_the_steps_it_was_logged_at() -> None:
    drawn = panels(LOG)
    assert drawn["loss"] == {"training": ([20, 40], [3.0, 2.0]), "validation": ([40], [2.5])}
    assert drawn["gradient norm"] == {"gradient norm": ([20, 40], [1.5, 1.0])}
    assert set(drawn["ROUGE (validation)"]) == {"ROUGE-1", "ROUGE-2", "ROUGE-L"}
    assert drawn["learning rate (warm weights)"]["learning rate"][1] == [1e-4, 5e-5]


def test_a_panel_without_entries_is_left_out() -> None:
    assert set(panels(LOG[:1])) == {"loss", "gradient norm", "learning rate (warm weights)"}


def test_the_terminal_shows_every_panel() -> None:
    text = terminal(panels(LOG), width=60, height=10)
    for name in panels(LOG):
        assert name in text
    assert "ROUGE-2" in text
    assert "\x1b" not in text  # a file or a pipe shows it too
    assert max(map(len, text.splitlines())) <= 60


def test_a_run_that_has_ended_is_drawn_into_its_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(["plot", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "ROUGE (validation)" in out
    png = (copy / "plot.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_a_run_that_still_goes_on_is_read_from_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "best")
    assert max(entry["step"] for entry in read_log(copy)) == 8
    shutil.rmtree(copy / "checkpoint-8")
    assert max(entry["step"] for entry in read_log(copy)) == 4


def test_a_run_begun_anew_is_not_hidden_by_what_the_last_one_left(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    state = copy / "checkpoint-8" / "trainer_state.json"
    record = json.loads(state.read_text(encoding="utf-8"))
    record["log_history"] = LOG
    state.write_text(json.dumps(record), encoding="utf-8")
    os.utime(copy / "best" / "run.json", (1, 1))
    assert read_log(copy) == LOG


def test_a_folder_without_a_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path)]) == 2
    assert "has no log" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.plot.find_spec", lambda _: None)
    with pytest.raises(PlotError, match=r"plotext is not installed: pip install 'precis\[follow\]'"):
        terminal(panels(LOG))
    with pytest.raises(PlotError, match=r"matplotlib is not installed"):
        write_png(panels(LOG), tmp_path / "a.png", "a")


def test_drawing_needs_no_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pyplot is what looks for one. Others may have loaded it here before.
    monkeypatch.delattr("matplotlib.pyplot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    write_png(panels(LOG), tmp_path / "a.png", "a")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_state_that_is_being_written_hides_no_older_one(run: Path, tmp_path: Path) -> None:
    state = max(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    for step, content in (("4", state.read_text(encoding="utf-8")), ("8", '{"log_hist')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content, encoding="utf-8")
    (tmp_path / "checkpoint-12").mkdir()
    assert read_log(tmp_path) == json.loads(state.read_text(encoding="utf-8"))["log_history"]
