"""The slope of a series over time, with an interval that knows that neighbouring samples are alike.

Least squares; the interval is a moving-block bootstrap of the residuals, in blocks of an eighth of the series, widened
as for so few independent values (Student's t, and the two that the line has taken). Knows no unit and no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BLOCKS = 8
LEAST_SAMPLES = 3 * BLOCKS
RESAMPLES = 4000
LEVEL = 0.95
FREE = BLOCKS - 2
WIDER = float(stats.t.ppf((1 + LEVEL) / 2, FREE) / stats.norm.ppf((1 + LEVEL) / 2)) * (BLOCKS / FREE) ** 0.5


@dataclass(frozen=True)
class Slope:
    """Change of the value for one unit of time, and where it lies with 95 %."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Slope:
        """In another unit."""
        return Slope(self.value * factor, self.low * factor, self.high * factor)


def slope_of(times: Sequence[float], values: Sequence[float], seed: int = 0) -> Slope:
    """Fit a line.

    Raises:
        ValueError: fewer than `LEAST_SAMPLES`, three for each block.
    """
    count = len(values)
    if count < LEAST_SAMPLES:
        raise ValueError(f"{count} samples are too few for an interval; it takes {LEAST_SAMPLES}")
    at, held = np.asarray(times, dtype=float), np.asarray(values, dtype=float)
    at, held = at - at.mean(), held - held[0]  # what does not change at all is zero, not a rounding error
    spread = at @ at
    value = float(at @ held / spread)
    residuals = held - held.mean() - value * at
    length = count // BLOCKS
    blocks = -(-count // length)
    starts = np.random.default_rng(seed).integers(0, count - length + 1, size=(RESAMPLES, blocks))
    picked = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count]
    errors = residuals[picked] @ at / spread
    low, high = WIDER * np.quantile(errors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Slope(value, value - float(high), value - float(low))
