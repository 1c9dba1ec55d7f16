"""A sweep: real runs of a tiny model, one after another where they must be, and a table of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.train.conftest import make_config
from tests.unit.train.test_denoising import toml
from train.__main__ import main
from train.config import ConfigError, load_config
from train.sweep import Course, Plan, PlannedRun, format_sweep, load_plan, sweep, words_of
from train.warm_start import load_model

PLANS = Path(__file__).parents[3] / "train" / "configs" / "sweeps"


def write_config(folder: Path, base: Path, data: Path) -> Path:
    """A run's settings as a file."""
    path = folder / "run.toml"
    path.write_text(toml(json.loads(json.dumps(make_config(base, data, folder / "run").to_dict()))), encoding="utf-8")
    return path


def plan_of(config: Path, *runs: PlannedRun, words: Sequence[str] = ("optim.max_steps=2",)) -> Plan:
    return Plan(str(config), tuple(words), runs)


@pytest.fixture(scope="module")
def swept(
    base: Path, data: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A first stage, a run from it with half the layers, a run that fails, and one that would have followed it."""
    folder = tmp_path_factory.mktemp("sweep")
    stage = (f"denoising.path={texts}", "denoising.max_tokens=32", "denoising.held_out=4", "denoising.max_steps=2")
    plan = plan_of(
        write_config(folder, base, data),
        PlannedRun("stage", "denoise", set=stage),
        PlannedRun("shallow", after="stage", set=("model.decoder_layers=1",)),
        PlannedRun("wrong", set=("data.path=/nowhere",)),
        PlannedRun("orphan", after="wrong"),
    )
    rows = sweep(plan, folder / "out", jobs=2)
    return folder / "out", {row["name"]: row for row in rows}


def test_each_run_has_its_model_and_its_line(swept: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, rows = swept
    assert {name: row["state"] for name, row in rows.items()} == {
        "stage": "ended",
        "shallow": "ended",
        "wrong": "failed",
        "orphan": "failed",
    }
    assert rows["stage"]["best"]["loss"] > 0
    assert {"rouge1", "rouge2", "rougeL"} <= rows["shallow"]["best"].keys()
    assert json.loads((folder / "sweep.json").read_text(encoding="utf-8")) == list(rows.values())
    table = format_sweep(list(rows.values()))
    assert re.search(r"^shallow +stage +ended .* model\.decoder_layers=1$", table, re.MULTILINE)
    assert len(table.splitlines()) == 5


def test_a_run_goes_on_from_the_one_before_it(swept: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, _ = swept
    record = json.loads((folder / "shallow" / "best" / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["model"]["init_from"] == str(folder / "stage" / "denoising" / "best")
    assert load_model(folder / "shallow" / "best")[0].config.decoder.num_hidden_layers == 1


def test_a_failure_says_where_its_words_are(swept: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, rows = swept
    assert rows["wrong"]["error"] == f"exit status 2; see {folder / 'wrong' / 'log.txt'}"
    assert "/nowhere" in (folder / "wrong" / "log.txt").read_text(encoding="utf-8")
    assert rows["orphan"]["error"] == "wrong failed"


def test_what_runs_at_the_end_of_the_time_is_cut_off(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, now = tmp_path / "out" / "first" / "log.txt", time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now + 100 * log.exists(), sleep=time.sleep)
    monkeypatch.setattr("train.sweep.time", clock)
    plan = plan_of(write_config(tmp_path, base, data), PlannedRun("first"), PlannedRun("second", after="first"))
    rows = sweep(plan, tmp_path / "out", jobs=1, minutes=1)
    assert [row["state"] for row in rows] == ["cut off", "cut off"]
    assert log.exists()
    assert not (tmp_path / "out" / "second").exists()


def test_a_wrong_setting_of_any_run_stops_all_of_them(base: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, base, data)
    plan = plan_of(config, PlannedRun("first"), PlannedRun("second", set=("optim.epoch=3",)))
    with pytest.raises(ConfigError, match=r"optim\.epoch is not a setting"):
        sweep(plan, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "first").mkdir(parents=True)
    with pytest.raises(ConfigError, match="begins in folders of its own"):
        sweep(plan_of(config, PlannedRun("first")), tmp_path / "out", jobs=1)
    with pytest.raises(ConfigError, match="--jobs must be at least 1; it is 0"):
        sweep(plan_of(config, PlannedRun("other")), tmp_path / "out", jobs=0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("config = ", "is not TOML"),
        ('config = "a"\nrun = 1', "run is not a setting of a plan"),
        ('config = "a"', r"names a config, and \[\[runs\]\]"),
        ('config = "a"\nruns = [1]', "are sections; one is 1"),
        ("config = 1\nruns = [1]", "config is a path"),
        ('config = "a"\n[[runs]]\nset = []', "a run has no name"),
        ('config = "a"\n[[runs]]\nname = "../x"', r"it is '\.\./x'"),
        ('config = "a"\n[[runs]]\nname = "x"\nset = "a=b"', "set is a list of words"),
        ('config = "a"\n[[runs]]\nname = "x"\nstop = 1', "stop is not a setting of a run"),
        ('config = "a"\n[[runs]]\nname = "x"\ncommand = "export"', "has the command 'export'"),
        ('config = "a"\n[[runs]]\nname = "x"\n[[runs]]\nname = "x"', "two runs are called x"),
        ('config = "a"\n[[runs]]\nname = "x"\nafter = "y"', "no run above it is called so"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(plan, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_plan(path)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_plan_and_each_of_its_runs_can_be_read(path: Path, tmp_path: Path) -> None:
    plan = load_plan(path)
    courses = {run.name: Course(run, tmp_path / run.name) for run in plan.runs}
    for course in courses.values():
        config = load_config(plan.config, words_of(plan, course, courses, ()))
        assert (config.name, config.output_dir) == (course.run.name, str(course.folder))
        assert course.run.after is None or config.model.init_from == str(courses[course.run.after].best)


def test_the_command_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["sweep", "--plan", str(PLANS / "dialogsum-shipped.toml"), "--output", str(tmp_path / "out"), "no.such=1"]
    assert main(words) == 2
    assert "no is not a setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("states", "status", "said"),
    [
        (["ended", "ended"], 0, ""),
        (["ended", "cut off"], 0, ""),
        (["failed", "ended", "failed"], 2, "error: 2 of 3 runs failed; see {table}\n"),
    ],
)
def test_the_command_fails_if_a_run_has(
    states: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: list[dict[str, Any]] = [
        {"name": f"r{i}", "after": None, "state": state, "seconds": 1.0, "set": []} for i, state in enumerate(states)
    ]
    monkeypatch.setattr("train.sweep.sweep", lambda *args: rows)
    plan = str(PLANS / "dialogsum-shipped.toml")
    assert main(["sweep", "--plan", plan, "--output", str(tmp_path)]) == status
    printed = capsys.readouterr()
    assert printed.err == said.format(table=tmp_path / "sweep.json")
    assert all(row["name"] in printed.out for row in rows)


def test_a_plan_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b'config = "\xfc"')
    with pytest.raises(ConfigError, match=r"plan\.toml is not UTF-8"):
        load_plan(path)


def test_where_a_run_writes_is_not_for_words_to_say(base: Path, data: Path, tmp_path: Path) -> None:
    plan = plan_of(write_config(tmp_path, base, data), PlannedRun("1st", set=("output_dir=/elsewhere", "name=other")))
    course = Course(plan.runs[0], tmp_path / "1st")
    config = load_config(plan.config, words_of(plan, course, {"1st": course}, ("output_dir=/far",)))
    assert (config.name, config.output_dir) == ("1st", str(tmp_path / "1st"))
