"""Dollars for a million summaries."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.cost import dollars, priced


def test_a_million_at_one_a_second_takes_278_hours() -> None:
    assert dollars(rate=1.0, replicas=1, utilisation=1.0, price=1.0) == pytest.approx(277.78, abs=0.01)


def test_replicas_share_a_price_and_idle_time_is_paid() -> None:
    assert dollars(10.0, 4, 0.5, 0.2) == pytest.approx(dollars(10.0, 1, 1.0, 0.2) / 2)


def test_a_price_has_a_name_dollars_and_replicas() -> None:
    assert priced("c7i.large=0.1=2") == ("c7i.large", 0.1, 2)


@pytest.mark.parametrize("argument", ["a", "a=1", "a=b=1", "a=1=1.5", "a=0=1", "a=1=0", "a=1=2=3"])
def test_what_is_no_price_is_refused(argument: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a"):
        priced(argument)
