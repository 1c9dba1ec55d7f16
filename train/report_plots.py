"""The report's figures as PNG, from what `report.json` holds; no window, no global state of matplotlib.

Knows how numbers are drawn. Does not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.metrics import ALL_ROUGE_TYPES, ROUGE_NAMES, ROUGE_TYPES

DPI = 100


def draw(whole: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the figures into `folder`.

    Returns:
        What each file shows, by its name.
    """
    shown: dict[str, tuple[Callable[[Mapping[str, Any], Axes], None], str]] = {
        "scores.png": (_scores, "ROUGE F1 x 100 of each system with 95 % intervals"),
        "differences.png": (_differences, "the model minus each system over the same rows, with 95 % intervals"),
        "slices.png": (_slices, "ROUGE of the model by source length, with 95 % intervals"),
        "lengths.png": (_lengths, "words of the model's summaries and of the references"),
        "novelty.png": (_novelty, "n-grams that the source does not hold"),
    }
    for name, (function, title) in shown.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        function(whole["report"], axes)
        axes.set_title(title, fontsize=10)
        figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
    return {name: title for name, (_, title) in shown.items()}


def _scores(report: Mapping[str, Any], axes: Axes) -> None:
    use = next(iter(report["scores"]))
    systems = report["scores"][use]
    for place, (system, scores) in enumerate(systems.items()):
        shift = (place - (len(systems) - 1) / 2) * 0.8 / len(systems)
        at = [i + shift for i in range(len(ALL_ROUGE_TYPES))]
        _points(axes, at, [scores[kind] for kind in ALL_ROUGE_TYPES], system)
    axes.set_xticks(range(len(ALL_ROUGE_TYPES)), [ROUGE_NAMES[kind] for kind in ALL_ROUGE_TYPES])
    axes.set_ylabel(f"F1 x 100, references: {use}")
    axes.grid(axis="y", alpha=0.3)
    _legend(axes)


def _differences(report: Mapping[str, Any], axes: Axes) -> None:
    use = next(iter(report["differences"]))
    systems = report["differences"][use]
    for place, kind in enumerate(ROUGE_TYPES):
        intervals = [found[kind] for found in systems.values()]
        heights = [i + 0.2 * (place - 1) for i in range(len(systems))]
        axes.errorbar(
            [one["mean"] for one in intervals], heights, xerr=_bars(intervals), fmt="o", label=ROUGE_NAMES[kind]
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(systems)), [f"minus {name}" for name in systems])
    axes.invert_yaxis()
    axes.set_xlabel(f"F1 x 100, references: {use}")
    axes.grid(axis="x", alpha=0.3)
    _legend(axes)


def _slices(report: Mapping[str, Any], axes: Axes) -> None:
    slices = report["slices"]
    for place, kind in enumerate(ROUGE_TYPES):
        at = [i + 0.15 * (place - 1) for i in range(len(slices))]
        _points(axes, at, [part["scores"][kind] for part in slices], ROUGE_NAMES[kind])
    names = ["{} to {}\n({} rows)".format(*part["source_tokens"], part["rows"]) for part in slices]
    axes.set_xticks(range(len(slices)), names)
    axes.set_xlabel("tokens of the source")
    axes.set_ylabel(f"F1 x 100, references: {report['slice_references']}")
    axes.grid(axis="y", alpha=0.3)
    _legend(axes)


def _lengths(report: Mapping[str, Any], axes: Axes) -> None:
    found = report["word_histogram"]
    for name in ("model", "references"):
        total = max(sum(found[name]), 1)
        axes.stairs([count / total for count in found[name]], found["edges"], label=name, fill=True, alpha=0.45)
    axes.set_xlabel("words")
    axes.set_ylabel("share of the texts")
    _legend(axes)


def _novelty(report: Mapping[str, Any], axes: Axes) -> None:
    # Baselines copy: they have none but where turns meet.
    systems = ["model", *report["limits"], "references"]
    shown = list(dict.fromkeys(systems))
    for place, system in enumerate(shown):
        found = [report["text"][system][f"novelty_{n}"] for n in (1, 2, 3, 4)]
        at = [n + (place - (len(shown) - 1) / 2) * 0.8 / len(shown) for n in range(4)]
        axes.bar(at, [one["mean"] if one else 0.0 for one in found], 0.8 / len(shown), label=system)
    axes.set_xticks(range(4), [f"{n}-grams" for n in (1, 2, 3, 4)])
    axes.set_ylabel("new, %")
    _legend(axes)


def _points(axes: Axes, at: Sequence[float], intervals: Sequence[Mapping[str, float]], label: str) -> None:
    axes.errorbar(at, [one["mean"] for one in intervals], yerr=_bars(intervals), fmt="o", label=label, markersize=4)


def _legend(axes: Axes) -> None:
    """Beside the plot, where it hides nothing."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _bars(intervals: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Distances below and above the mean; rounding may put a bound on the wrong side of it by a hair."""
    below = [max(one["mean"] - one["low"], 0.0) for one in intervals]
    above = [max(one["high"] - one["mean"], 0.0) for one in intervals]
    return [below, above]
