"""`benchmarks.soak` for some seconds: nothing leaks and everybody is answered once. Memory's slope takes longer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import soak
from benchmarks.traffic import Rest

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def measured() -> soak.Measured:
    return soak.run(soak.Plan(rounds=4, seconds=2, callers=4, every=0.5, references=2, options=2, caches=False))


def test_nothing_leaks_and_every_request_is_answered_once(measured: soak.Measured) -> None:
    assert not measured.ledger.faults
    # Some seconds may pass without a deadline among the kinds of callers.
    criteria = [criterion for criterion in soak.judge(measured) if criterion.name != "deadlines that passed"]
    assert not [criterion for criterion in criteria if not criterion.met]


def test_callers_of_many_kinds_have_called(measured: soak.Measured) -> None:
    assert len(measured.ledger.kinds) >= 4
    assert measured.ledger.left


def test_every_round_is_sampled_and_ends_at_rest(measured: soak.Measured) -> None:
    assert (len(measured.warming), len(measured.rests)) == (1, 3)
    assert all(one.loaded for one in measured.rounds)
    assert all(rest.files <= measured.warm.footprint.files for rest in measured.rests)
    assert all(0 < rest.anon < rest.rss for rest in measured.rests)
    assert measured.requests <= measured.ledger.sent
    assert not measured.not_at_rest


def test_a_leak_a_lost_reply_and_a_wrong_summary_are_seen(measured: soak.Measured) -> None:
    end = measured.end.footprint
    leaking = Rest(replace(end, threads=end.threads + 1, files=end.files + 1), reached=False)
    ledger = replace(measured.ledger, left=measured.ledger.left + 1, faults=["wrong"])
    worse = replace(measured, end=leaking, ledger=ledger, filled=15, errors=["x ERROR y"])
    assert {criterion.name for criterion in soak.judge(worse) if not criterion.met} >= {
        "threads as after the warm-up",
        "open files as after the warm-up",
        "every reading was at rest",
        "replies as they should be",
        "each request counted once",
        "all slots can be used",
        "no error logged, clean exit",
    }
