"""What a run's log shows, drawn: `python -m train plot RUN` writes a PNG and draws the same in the terminal.

Knows the Trainer's log, of a run that has ended (`run.json`) or still goes on (its newest checkpoint's
`trainer_state.json`). Does not know the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.records import BEST

# A panel each: its title, and which entries of the log it draws under which label.
PANELS: dict[str, dict[str, str]] = {
    "loss": {"loss": "training", "eval_loss": "validation"},
    "ROUGE (validation)": {"eval_rouge1": "ROUGE-1", "eval_rouge2": "ROUGE-2", "eval_rougeL": "ROUGE-L"},
    "learning rate (warm weights)": {"learning_rate": "learning rate"},
    "gradient norm": {"grad_norm": "gradient norm"},
}
Series = tuple[list[float], list[float]]


class PlotError(ValueError):
    """There is no log to draw, or nothing to draw it with; the message says what is missing."""


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's log, each with its `step`.

    Args:
        run: the run's output folder (also `output_dir/denoising`), or a folder with a `run.json`.

    Raises:
        PlotError: the folder has no log: the first checkpoint is not written yet, or it is no run.
    """
    ended = [path for path in (run / "run.json", run / BEST / "run.json") if path.exists()]
    states = list(run.glob("checkpoint-*/trainer_state.json"))
    # A run that was begun anew, or goes on, is newer than what the last one left.
    for path in sorted((*ended, *states), key=lambda path: path.stat().st_mtime if path.exists() else 0, reverse=True):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # of a run that goes on: being written, or gone by now
            continue
        log: list[dict[str, Any]] = record.get("log", record.get("log_history", []))
        if log:
            return log
    raise PlotError(f"{run} has no log: neither run.json nor a checkpoint with trainer_state.json")


def panels(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Series]]:
    """The series of every panel that the log has something for: steps and values, by label."""
    found: dict[str, dict[str, Series]] = {}
    for title, names in PANELS.items():
        for name, label in names.items():
            points = [(float(entry["step"]), float(entry[name])) for entry in log if name in entry and "step" in entry]
            if points:
                steps, values = zip(*points, strict=True)
                found.setdefault(title, {})[label] = (list(steps), list(values))
    return found


def write_png(drawn: Mapping[str, Mapping[str, Series]], path: Path, title: str) -> Path:
    """One panel under the other, over the same steps.

    Raises:
        PlotError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise PlotError("matplotlib is not installed: pip install 'precis[follow]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)  # needs no screen
    axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, series) in zip(axes, drawn.items(), strict=True):
        for label, (steps, values) in series.items():
            ax.plot(steps, values, label=label, marker="." if len(steps) < 30 else None)
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
        if len(series) > 1:
            ax.legend(loc="best", fontsize="small")
    axes[-1].set_xlabel("step")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path


def terminal(drawn: Mapping[str, Mapping[str, Series]], width: int = 100, height: int = 14) -> str:
    """The same panels as text.

    Raises:
        PlotError: plotext is missing.
    """
    if find_spec("plotext") is None:
        raise PlotError("plotext is not installed: pip install 'precis[follow]'")
    import plotext

    texts = []
    for name, series in drawn.items():
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(width, height)
        plotext.title(name)
        plotext.xlabel("step")
        for label, (steps, values) in series.items():
            plotext.plot(steps, values, label=label if len(series) > 1 else None)
        texts.append(plotext.uncolorize(plotext.build()))
    return "\n".join(texts)
