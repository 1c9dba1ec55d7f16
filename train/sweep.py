"""Many runs on one device, side by side, and one table of what validation says: `python -m train sweep --plan FILE`.

A run may begin where another has ended (`after`): a first stage, then several ways to go on from it. Each is a process
of its own, `python -m train`, so that small models fill a large device together. Knows names, words and logs of runs.
Does not know what a run does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from train.config import ConfigError, load_config, read_toml
from train.plot import PlotError, read_log
from train.records import BEST

TABLE = "sweep.json"
LOG = "log.txt"
FIRST_STAGE = "denoising"
# Of a run: also a folder's, and a word `name=...` that is a text.
NAME = re.compile(r"[A-Za-z][\w.-]*")
State = Literal["waiting", "running", "ended", "failed", "cut off"]
# Seconds that a run which is cut off has to end by itself.
GRACE = 5.0


class SweepError(RuntimeError):
    """Runs of a sweep have failed; the message says how many."""


@dataclass(frozen=True)
class PlannedRun:
    """One `[[runs]]` of a plan.

    Attributes:
        name: also its folder's, below the output.
        command: finetune, or the first stage alone.
        after: the run whose best model it starts from; None is the warm start.
        set: words `key=value` over the plan's own.
    """

    name: str
    command: Literal["finetune", "denoise"] = "finetune"
    after: str | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A sweep: the configuration that all runs share, words over it, and the runs."""

    config: str
    set: tuple[str, ...] = ()
    runs: tuple[PlannedRun, ...] = ()


@dataclass
class Course:
    """What has become of a run: waiting, running, ended, failed (or what it stood on did), cut off."""

    run: PlannedRun
    folder: Path
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Path:
        """Where its best model is."""
        return (self.folder / FIRST_STAGE if self.run.command == "denoise" else self.folder) / BEST


def load_plan(path: str | Path) -> Plan:
    """Read a TOML plan; `config` is a path beside it.

    Raises:
        ConfigError: no TOML, an unknown key, a name that comes twice or that nobody has, or no run.
    """
    path = Path(path)
    table = read_toml(path)
    known = {"config", "set", "runs"}
    if unknown := sorted(table.keys() - known):
        raise ConfigError(f"{path}: {unknown[0]} is not a setting of a plan; known: {', '.join(sorted(known))}")
    if "config" not in table or not table.get("runs"):
        raise ConfigError(f"{path}: a plan names a config, and [[runs]]")
    if not isinstance(table["config"], str) or not isinstance(table["runs"], list):
        raise ConfigError(f"{path}: config is a path, and [[runs]] are sections")
    runs = tuple(_planned(run, path) for run in table["runs"])
    names: set[str] = set()
    for run in runs:
        if run.name in names:
            raise ConfigError(f"{path}: two runs are called {run.name}")
        if run.after is not None and run.after not in names:
            raise ConfigError(f"{path}: {run.name} comes after {run.after}, and no run above it is called so")
        names.add(run.name)
    return Plan(str(path.parent / table["config"]), _words(table, path), runs)


def _words(table: dict[str, Any], path: Path) -> tuple[str, ...]:
    words = table.get("set", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{path}: set is a list of words key=value; it is {words!r}")
    return tuple(words)


def _planned(table: Any, path: Path) -> PlannedRun:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: [[runs]] are sections; one is {table!r}")
    known = {"name", "command", "after", "set"}
    if unknown := sorted(table.keys() - known):
        raise ConfigError(f"{path}: {unknown[0]} is not a setting of a run; known: {', '.join(sorted(known))}")
    if not table.get("name"):
        raise ConfigError(f"{path}: a run has no name")
    if not isinstance(table["name"], str) or not NAME.fullmatch(table["name"]):
        raise ConfigError(f"{path}: a name is letters, digits, '.', '_' and '-'; it is {table['name']!r}")
    command = table.get("command", "finetune")
    if command not in ("finetune", "denoise"):
        raise ConfigError(f"{path}: {table['name']} has the command {command!r}; known: finetune, denoise")
    return PlannedRun(table["name"], command, table.get("after"), _words(table, path))


def sweep(
    plan: Plan, output: Path, jobs: int, overrides: Sequence[str] = (), minutes: float | None = None
) -> list[dict[str, Any]]:
    """Run a plan, at most `jobs` at a time, in its order; the table is in `output/sweep.json` from the first end on.

    Args:
        overrides: words `key=value` over all others, for every run.
        minutes: whatever still runs then is cut off, and what waits stays undone.

    Returns:
        A row a run, as in the file.

    Raises:
        ConfigError: a run's settings are wrong, or its folder exists; nothing has run then.
    """
    courses = {run.name: Course(run, output / run.name) for run in plan.runs}
    for course in courses.values():
        if course.folder.exists():
            raise ConfigError(f"{course.folder} exists; a sweep begins in folders of its own")
        load_config(plan.config, words_of(plan, course, courses, overrides))
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1; it is {jobs}")
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    try:
        with _termination_as_exit():
            _run_all(plan, output, jobs, overrides, courses, end)
    finally:
        _cut_off(list(courses.values()))  # of runs that have ended nothing is left to cut
        rows = write_table(output, list(courses.values()))
    return rows


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does: its runs with it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(
    plan: Plan, output: Path, jobs: int, overrides: Sequence[str], courses: dict[str, Course], end: float
) -> None:
    while any(course.state in ("waiting", "running") for course in courses.values()):
        if time.monotonic() > end:
            _cut_off(list(courses.values()))
        changed = [course for course in courses.values() if course.state == "running" and _ended(course)]
        for course in courses.values():
            before = courses[course.run.after] if course.run.after else None
            if course.state == "waiting" and before is not None and before.state in ("failed", "cut off"):
                course.state = "failed"
                course.result = {"error": f"{before.run.name} {before.state}"}
                changed.append(course)
            running = sum(other.state == "running" for other in courses.values())
            if course.state == "waiting" and running < jobs and (before is None or before.state == "ended"):
                _start(course, plan, words_of(plan, course, courses, overrides))
        if changed:
            write_table(output, list(courses.values()))
            for course in changed:
                print(f"{course.run.name}: {course.state} after {course.seconds:.0f} s", flush=True)
        time.sleep(0.2)


def words_of(plan: Plan, course: Course, courses: dict[str, Course], overrides: Sequence[str]) -> list[str]:
    """The overrides of a run: the plan's, its own, the caller's, where it begins and writes; the last one counts."""
    words = [*plan.set, *course.run.set, *overrides, f'name="{course.run.name}"', f"output_dir={course.folder}"]
    if course.run.after is not None:
        words.append(f"model.init_from={courses[course.run.after].best}")
    return words


def _start(course: Course, plan: Plan, words: list[str]) -> None:
    course.folder.mkdir(parents=True)
    command = [sys.executable, "-m", "train", course.run.command, "--config", plan.config, *words]
    with (course.folder / LOG).open("wb") as log:
        # A session of its own: a run that is cut off takes its workers along.
        course.process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    course.began, course.state = time.monotonic(), "running"


def _ended(course: Course) -> bool:
    assert course.process is not None, "it runs"
    status = course.process.poll()
    if status is None:
        return False
    course.seconds = time.monotonic() - course.began
    course.state = "failed" if status else "ended"
    course.result = found(course)
    if status:
        course.result["error"] = f"exit status {status}; see {course.folder / LOG}"
    return True


def _cut_off(courses: Sequence[Course]) -> None:
    running = [course for course in courses if course.state == "running" and not _ended(course)]
    for course in running:
        assert course.process is not None, "it runs"
        os.killpg(course.process.pid, signal.SIGTERM)
    for course in running:
        assert course.process is not None, "it runs"
        try:
            course.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(course.process.pid, signal.SIGKILL)
            course.process.wait()
        course.seconds = time.monotonic() - course.began
        course.result = found(course)
    for course in courses:
        if course.state in ("waiting", "running"):
            course.state = "cut off"


def found(course: Course) -> dict[str, Any]:
    """What a run's log says: steps, epochs, and the evaluation with the best ROUGE-2, or the least loss without one."""
    folder = course.folder / FIRST_STAGE if course.run.command == "denoise" else course.folder
    try:
        log = read_log(folder)
    except PlotError:
        return {}
    evaluations = [entry for entry in log if "eval_loss" in entry]
    result: dict[str, Any] = {"steps": log[-1].get("step"), "epochs": log[-1].get("epoch")}
    if evaluations:
        best = max(evaluations, key=lambda entry: (entry.get("eval_rouge2", 0.0), -entry["eval_loss"]))
        names = ("step", "epoch", "eval_loss", "eval_rouge1", "eval_rouge2", "eval_rougeL")
        result["best"] = {name.removeprefix("eval_"): best[name] for name in names if name in best}
        result["evaluations"] = [
            {name.removeprefix("eval_"): entry[name] for name in names if name in entry} for entry in evaluations
        ]
    return result


def write_table(output: Path, courses: Sequence[Course]) -> list[dict[str, Any]]:
    """Write the rows as they are now, whole or not at all."""
    rows = [
        {
            "name": course.run.name,
            "command": course.run.command,
            "after": course.run.after,
            "set": list(course.run.set),
            "state": course.state,
            "seconds": round(course.seconds, 1),
            **course.result,
        }
        for course in courses
    ]
    partial = output / f"{TABLE}.partial"
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(output / TABLE)
    return rows


def format_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """A line a run, those with the best ROUGE-2 first, then losses alone, then what has no figure."""
    width = max([4, *(len(row["name"]) for row in rows)])
    after = max([5, *(len(row["after"] or "-") for row in rows)])
    lines = [
        f"{'run':<{width}}  {'after':<{after}}  {'state':<7}  {'min':>5}  {'epoch':>6}  {'of':>5}  {'loss':>6}"
        f"  {'R-1':>5}  {'R-2':>5}  {'R-L':>5}  settings"
    ]
    for row in sorted(rows, key=_rank):
        best = row.get("best", {})
        scores = "".join(
            f"  {best[name]:5.2f}" if name in best else f"  {'-':>5}" for name in ("rouge1", "rouge2", "rougeL")
        )
        loss = f"{best['loss']:6.3f}" if "loss" in best else f"{'-':>6}"
        epoch = f"{best['epoch']:6.1f}" if "epoch" in best else f"{'-':>6}"
        of = f"{row['epochs']:5.1f}" if row.get("epochs") else f"{'-':>5}"
        lines.append(
            f"{row['name']:<{width}}  {row['after'] or '-':<{after}}  {row['state']:<7}  {row['seconds'] / 60:5.1f}"
            f"  {epoch}  {of}  {loss}{scores}  {' '.join(' '.join(row['set']).split())}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    best = row.get("best", {})
    return -best.get("rouge2", -1.0), best.get("loss", float("inf"))
