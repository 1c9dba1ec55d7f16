"""What a run must show: a measured value, what is asked of it, and the verdict. Knows no measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Report


@dataclass(frozen=True)
class Criterion:
    """One of them, with the words that the table shows."""

    name: str
    measured: str
    asked: str
    met: bool

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def show(report: Report, criteria: Iterable[Criterion]) -> None:
    """Print each with its verdict."""
    rows = [[c.name, c.measured, c.asked, "met" if c.met else "NOT MET"] for c in criteria]
    report.table(["criterion", "measured", "asked", "verdict"], rows)
