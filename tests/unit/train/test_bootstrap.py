"""Intervals of means, and differences over the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from train.bootstrap import format_interval, mean_interval, paired_difference


def test_an_interval_holds_its_mean_and_is_the_same_again() -> None:
    values = [float(i % 10) for i in range(200)]
    interval = mean_interval(values)
    assert interval == mean_interval(values)
    assert interval.mean == 4.5
    # The normal approximation: 1.96 x 2.872 / sqrt(200) = 0.398.
    assert interval.low == pytest.approx(4.10, abs=0.03)
    assert interval.high == pytest.approx(4.90, abs=0.03)
    assert interval.p_value is None


def test_a_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    baseline = [float(10 * (i % 10)) for i in range(100)]
    values = [value + 1 + (i % 2) for i, value in enumerate(baseline)]
    difference = paired_difference(values, baseline)
    assert difference.mean == 1.5
    assert difference.low > 1
    assert difference.p_value is not None
    assert difference.p_value < 0.001
    assert mean_interval(values).low < mean_interval(baseline).high


def test_no_difference_has_p_one() -> None:
    difference = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (difference.mean, difference.low, difference.high, difference.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_equal_systems_have_p_one_and_systems_that_differ_by_noise_a_large_one() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(30, 10, 200)
    assert paired_difference(values.tolist(), values.tolist()).p_value == 1.0
    noise = rng.normal(0, 1, 100)
    noise = np.concatenate([noise, -noise])  # no difference on average
    p_value = paired_difference((values + noise).tolist(), values.tolist()).p_value
    assert p_value is not None
    assert p_value > 0.9


def test_intervals_hold_the_true_mean_in_about_95_of_100_samples() -> None:
    rng = np.random.default_rng(1)
    samples = rng.exponential(10, (100, 120))
    held = sum(found.low <= 10 <= found.high for found in map(mean_interval, samples.tolist()))
    assert 88 <= held <= 99


def test_the_difference_changes_its_sign_with_the_order() -> None:
    one, other = [1.0, 5.0, 2.0, 8.0], [0.0, 6.0, 1.0, 3.0]
    ours, theirs = paired_difference(one, other), paired_difference(other, one)
    assert ours.mean == -theirs.mean == 1.5
    assert ours.p_value == pytest.approx(theirs.p_value, abs=0.02)


def test_an_interval_is_written_with_the_decimals_asked_for() -> None:
    assert format_interval({"mean": 41.2, "low": 40.1, "high": 42.3}) == "41.20 [40.10, 42.30]"
    assert format_interval({"mean": 41.25, "low": 40.1, "high": 42.3}, 0) == "41 [40, 42]"
