"""A server is at rest when what was asked for holds and its memory is level, and not before."""

from __future__ import annotations

import asyncio
from itertools import count
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks import traffic
from benchmarks.traffic import Footprint


class Watched:
    """A server that is looked at every 0.125 s and whose memory falls, 9 times."""

    def __init__(self) -> None:
        self.started = 0.0
        self._times = count()

    def footprint(self) -> Footprint:
        """The next one."""
        seen = next(self._times)
        return Footprint(at=self.started + seen / 8, rss=100 - min(seen, 9), pss=0, uss=0, threads=1, files=30 - seen)


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        assert seconds

    monkeypatch.setattr(asyncio, "sleep", at_once)
    monkeypatch.setattr(traffic, "time", SimpleNamespace(monotonic=lambda: 0.0))


@pytest.mark.parametrize(
    ("files", "at"),
    [(30, 1.125 + traffic.STILL_SECONDS), (5, 3.125), (-1000, 10.125)],
    ids=["memory is last", "files are last", "never"],
)
def test_at_rest_waits_for_level_memory_and_for_the_condition(files: int, at: float) -> None:
    server = Watched()
    found = asyncio.run(traffic.at_rest(cast(traffic.Server, server), lambda now: now.files <= files, seconds=10.0))
    assert found.at - server.started == pytest.approx(at)
