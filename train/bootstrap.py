"""How sure one can be of a mean over rows, and of a difference between two systems on the same rows.

Knows resampling (scipy's). Does not know what the numbers measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 10_000
SEED = 13


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval; `p_value` (two-sided, of no difference) stands on differences only."""

    mean: float
    low: float
    high: float
    p_value: float | None = None


def mean_interval(values: Sequence[float], digits: int = 2) -> Interval:
    """The mean and its 95 % percentile bootstrap interval over rows (seeded).

    Args:
        values: one a row, at least two rows.
        digits: decimals kept.
    """
    result = _bootstrap(values)
    low, high = result.confidence_interval
    return Interval(round(float(np.mean(values)), digits), round(float(low), digits), round(float(high), digits))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of `values - baseline` over the same rows, its 95 % interval and the two-sided bootstrap p-value.

    Rows are drawn in pairs, so what makes a row easy for both cancels out (Koehn 2004, EMNLP). The p-value is twice
    the share of resamples on the other side of zero, and never below what that many resamples can show. Each
    difference is tested by itself: among many, some fall below 0.05 by chance.
    """
    differences = np.subtract(values, baseline)
    result = _bootstrap(differences.tolist())
    low, high = result.confidence_interval
    drawn = result.bootstrap_distribution
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))
    return Interval(
        mean=round(float(differences.mean()), 2),
        low=round(float(low), 2),
        high=round(float(high), 2),
        p_value=round(p_value, 5),
    )


def format_interval(interval: dict[str, Any], digits: int = 2) -> str:
    """`41.20 [40.10, 42.30]`."""
    return f"{interval['mean']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def _bootstrap(values: Sequence[float]) -> Any:
    return bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=SEED)
