"""The interval of a slope: it holds zero where nothing grows, though neighbours are alike, and not where it does."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.slope import slope_of

SAMPLES = 270  # of the soak, after its warm-up
RUNS = 40


def wandering(seed: int, memory: float) -> np.ndarray:
    """Noise whose neighbours are alike."""
    steps = np.random.default_rng(seed).normal(size=SAMPLES + 200)
    values = [0.0]
    for step in steps:
        values.append(memory * values[-1] + step)
    return np.array(values[-SAMPLES:])


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_zero_lies_within_where_nothing_grows(memory: float) -> None:
    slopes = [slope_of(range(SAMPLES), wandering(seed, memory).tolist()) for seed in range(RUNS)]
    assert sum(slope.low <= 0 <= slope.high for slope in slopes) >= 0.85 * RUNS


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_growth_is_found(memory: float) -> None:
    growth = 0.1 * np.arange(SAMPLES)
    slopes = [slope_of(range(SAMPLES), (wandering(seed, memory) + growth).tolist()) for seed in range(RUNS)]
    assert all(slope.low > 0 for slope in slopes)
    assert np.mean([slope.value for slope in slopes]) == pytest.approx(0.1, rel=0.1)


def test_a_straight_line_is_its_own_slope() -> None:
    slope = slope_of([10.0 * i for i in range(60)], [5.0 + 3 * i for i in range(60)])
    assert (slope.value, slope.low, slope.high) == pytest.approx((0.3, 0.3, 0.3))


def test_what_does_not_change_has_no_slope() -> None:
    slope = slope_of([61.7 * i for i in range(30)], [633_339_904 + 0.1] * 30)
    assert (slope.value, slope.low, slope.high) == (0, 0, 0)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        slope_of(range(10), range(10))
