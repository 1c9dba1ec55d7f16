"""The soak's judgement of memory: a level process passes, one that leaks does not, nor a measurement too coarse to say.

Readings are simulated: as many as the soak takes, a minute apart, with noise whose neighbours are alike.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.callers import Ledger
from benchmarks.slope import Slope
from benchmarks.traffic import Footprint, Rest, Scrape

PLAN = soak.Plan()
RUNS = 100
NOISE = 1.0  # MiB
LEVEL = Slope(0.0, 0.0, 0.0)


def readings(seed: int, alike: float, count: int, leak: float = 0.0) -> list[Footprint]:
    """So many over the time after the warm-up.

    Args:
        alike: correlation of neighbours (a first-order autoregression, from its stationary state).
        leak: MiB an hour.
    """
    generator = np.random.default_rng(seed)
    noise = [NOISE * generator.normal()]
    for step in generator.normal(size=count - 1):
        noise.append(alike * noise[-1] + NOISE * (1 - alike**2) ** 0.5 * step)
    seconds = np.linspace(0, (PLAN.rounds - PLAN.warm_up) * PLAN.seconds, count)
    held = 2000 + np.array(noise) + leak * seconds / soak.HOUR
    return [
        Footprint(float(at), anon=int(size * soak.MIB), file=0, shmem=0, swap=0, threads=1, files=1)
        for at, size in zip(seconds, held, strict=True)
    ]


# Readings at rest, and samples under load, which are closer and more alike.
SERIES = pytest.mark.parametrize(("count", "alike"), [(30, 0.0), (30, 0.5), (360, 0.9)])


@SERIES
def test_the_interval_of_a_level_process_holds_zero(count: int, alike: float) -> None:
    slopes = [soak.slope(readings(seed, alike, count), "own") for seed in range(RUNS)]
    assert np.mean([slope.low <= 0 <= slope.high for slope in slopes]) >= 0.9


@SERIES
def test_the_interval_of_a_leaking_process_does_not(count: int, alike: float) -> None:
    slopes = [soak.slope(readings(seed, alike, count, leak=30.0), "own") for seed in range(RUNS)]
    assert all(slope.low > 0 for slope in slopes)
    assert np.mean([slope.low <= 30 <= slope.high for slope in slopes]) >= 0.9


@pytest.mark.parametrize(
    ("own", "file", "met"),
    [
        (Slope(0.5, -1.0, 2.0), LEVEL, [True, True, True]),
        (Slope(-2.0, -3.0, -1.0), LEVEL, [True, True, True]),
        (Slope(2.0, 0.1, 4.0), LEVEL, [False, True, True]),
        (Slope(0.0, -20.0, 20.0), LEVEL, [True, False, True]),
        (Slope(30.0, 25.0, 35.0), LEVEL, [False, False, True]),
        (LEVEL, Slope(30.0, 25.0, 35.0), [True, True, False]),
        (LEVEL, Slope(0.3, 0.1, 0.5), [True, True, True]),
    ],
    ids=["level", "falling", "a small leak", "too coarse to say", "a leak", "ever more files", "pages touched late"],
)
def test_memory_must_be_level_and_known_to_be(own: Slope, file: Slope, met: list[bool]) -> None:
    assert [criterion.met for criterion in soak.memory({"own": own, "file": file}, largest_leak=15.0)] == met


def test_a_leak_is_ruled_out_by_the_requests_and_the_time_after_the_warm_up() -> None:
    rest = Rest(readings(0, 0.0, 1)[0], reached=True)
    rounds = [soak.Round([], Rest(replace(rest.footprint, at=900.0 * n), reached=True)) for n in (1, 2)]
    scrape = Scrape("")
    measured = soak.Measured(
        plan=PLAN,
        ledger=Ledger(),
        warming=[],
        rounds=rounds,
        requests=1024,
        warm=replace(rest, footprint=replace(rest.footprint, at=0.0)),
        end=rest,
        first=scrape,
        last=scrape,
        slots=0,
        filled=0,
        errors=[],
        exit_status=0,
    )
    assert measured.largest_leak == pytest.approx(2.0)  # MiB an hour: 1 KiB, 1,024 times in half an hour


def test_half_an_hour_of_traffic_comes_after_the_warm_up() -> None:
    assert (PLAN.rounds, PLAN.warm_up) == (40, 10)
    assert (PLAN.rounds - PLAN.warm_up) * PLAN.seconds >= 1800
