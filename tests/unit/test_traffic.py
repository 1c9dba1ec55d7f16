"""A footprint tells a process's own memory from mapped files; at rest a server's memory is level, and not before."""

from __future__ import annotations

import asyncio
from itertools import count
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks import traffic
from benchmarks.traffic import Footprint


class Watched:
    """A server that is looked at every 0.125 s and whose memory falls, 9 times, by pages of files or by others."""

    def __init__(self, of: str) -> None:
        self.of = of
        self.started = 0.0
        self._times = count()

    def footprint(self) -> Footprint:
        """The next one."""
        seen = next(self._times)
        at = self.started + seen / 8
        held = {"anon": 100, "file": 100, "shmem": 100, "swap": 100}
        held[self.of] -= min(seen, 9)
        return Footprint(at, **held, threads=1, files=30 - seen)


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        assert seconds

    monkeypatch.setattr(asyncio, "sleep", at_once)
    monkeypatch.setattr(traffic, "time", SimpleNamespace(monotonic=lambda: 0.0))


@pytest.mark.parametrize("of", ["anon", "file", "shmem", "swap"])
@pytest.mark.parametrize(
    ("files", "at", "reached"),
    [(30, 1.125 + traffic.STILL_SECONDS, True), (5, 3.125, True), (-1000, 10.125, False)],
    ids=["memory is last", "files are last", "never"],
)
def test_at_rest_waits_for_level_memory_and_for_the_condition_and_says_whether_it_gave_up(
    files: int, at: float, reached: bool, of: str
) -> None:
    server = Watched(of)
    found = asyncio.run(traffic.at_rest(cast(traffic.Server, server), lambda now: now.files <= files, seconds=10.0))
    assert found.footprint.at - server.started == pytest.approx(at)
    assert found.reached == reached


def test_own_memory_is_told_from_mapped_files_and_counts_swap() -> None:
    resident = "VmRSS:\t    1107 kB\nRssAnon:\t    1000 kB\nRssFile:\t     100 kB\nRssShmem:\t       7 kB\n"
    status = f"{resident}VmData:\t 9 kB\nVmSwap:\t       3 kB\nThreads:\t1\n"
    found = Footprint(0.0, **traffic.memory_of(status), threads=1, files=1)
    assert (found.own, found.file, found.rss) == (1010 * 1024, 100 * 1024, 1107 * 1024)
