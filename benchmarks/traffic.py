"""What the load scripts share: the real server as a process that can be watched, and texts of many lengths for it.

Knows processes, logs and `/metrics`. Does not know who calls, nor what is held against a limit.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 90.0
STILL_SECONDS = 1.0  # what a server gives back when its work ends goes sooner
STOP_SECONDS = 60.0
IDLE = {"precis_running": 0.0, "precis_queue_depth": 0.0, "precis_admitted_tokens": 0.0}

PLACES = ("the station", "the library", "the lake", "the new office", "my sister's flat", "the market", "the airport")
THINGS = ("the report", "two tickets", "a winter coat", "the keys", "a birthday cake", "the old printer", "a bicycle")
TIMES = ("on Monday", "after lunch", "at half past six", "next week", "before the meeting", "tomorrow morning")
NAMES = ("Anna", "Marc", "Mrs. Lindqvist", "the manager", "Tom", "our neighbour", "Dr. Okafor")
LINES = (
    "Could you bring {thing} to {place} {time}?",
    "I am sorry, {name} has already taken {thing} to {place}.",
    "Then let us meet {name} at {place} {time}, if that suits you.",
    "I would rather not. Last time we waited at {place} for more than an hour.",
    "{name} says that {thing} will not be ready, and that we should ask again {time}.",
    "How much did you pay for {thing}? I saw a cheaper one at {place}.",
    "All right, I will call {name} {time} and tell you what comes of it.",
    "Please do not forget {thing} again; {name} was quite angry about it.",
    "Is it far to {place}? I have to be back {time}.",
    "That is a good idea. I have not been to {place} since {name} moved away.",
)


def conversation(generator: random.Random, turns: int) -> str:
    """So many turns between two people, about 20 tokens each; what is said depends on the generator alone."""
    said = []
    for turn in range(turns):
        words = {"place": PLACES, "thing": THINGS, "time": TIMES, "name": NAMES}
        chosen = {key: generator.choice(values) for key, values in words.items()}
        said.append(f"#Person{1 + turn % 2}#: {generator.choice(LINES).format(**chosen)}")
    return "\n".join(said)


def conversations(count: int, seed: int = 0) -> list[str]:
    """Conversations of 2 to 20 turns, about 40 to 400 tokens, as many of each length."""
    generator = random.Random(seed)
    texts = [conversation(generator, 2 + index % 19) for index in range(count)]
    generator.shuffle(texts)
    return texts


@dataclass(frozen=True)
class Footprint:
    """What a process holds at one moment.

    Attributes:
        at: seconds on `time.monotonic()`.
        anon: resident bytes that no file stands behind: heaps, stacks, tensors.
        file: resident bytes of mapped files, which the kernel can read again.
        shmem: resident bytes of shared memory and of files that exist in memory only.
        swap: bytes of the first kind that the kernel has written to swap.
    """

    at: float
    anon: int
    file: int
    shmem: int
    swap: int
    threads: int
    files: int

    @property
    def own(self) -> int:
        """Bytes that no file stands behind, in memory or in swap: what the process keeps for itself."""
        return self.anon + self.shmem + self.swap

    @property
    def rss(self) -> int:
        """All resident bytes."""
        return self.anon + self.shmem + self.file


@dataclass(frozen=True)
class Rest:
    """A footprint, and whether the process had come to rest by then or the wait was given up."""

    footprint: Footprint
    reached: bool


def memory_of(status: str) -> dict[str, int]:
    """Bytes of each kind in the words of Linux' `/proc/<pid>/status`: `anon`, `file`, `shmem` and `swap`."""
    found = re.findall(r"^(?:Rss|Vm)(Anon|File|Shmem|Swap):\s*(\d+) kB$", status, re.MULTILINE)
    return {name.lower(): int(kib) * 1024 for name, kib in found}


class Server:
    """A server process that has said it is ready."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log
        self._watched = psutil.Process(process.pid)

    def footprint(self) -> Footprint:
        """Memory, threads and open files now."""
        held = memory_of(Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8"))
        threads, files = self._watched.num_threads(), self._watched.num_fds()
        return Footprint(time.monotonic(), **held, threads=threads, files=files)

    def cpu_seconds(self) -> float:
        """User and system time so far, of all threads."""
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def logged_errors(self) -> list[str]:
        """Lines of the log that are errors."""
        return re.findall(
            r"^.*(?: ERROR | CRITICAL |^Traceback).*$", self.log.read_text(encoding="utf-8"), re.MULTILINE
        )

    def stop(self) -> int:
        """Send SIGTERM and wait for the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def serve(log: Path, **settings: object) -> Iterator[Server]:
    """`python -m app` with these settings, and no others, on a free port, until the block ends."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PRECIS_", "OTEL_"))}
    environment |= {"PRECIS_PORT": "0", "PRECIS_LOG_LEVEL": "warning"}
    environment |= {f"PRECIS_{name.upper()}": str(value) for name, value in settings.items()}
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "app"], env=environment, stdout=stream, stderr=stream)
    try:
        yield Server(_wait_for_url(process, log), process, log)
    finally:
        process.kill()
        process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"curl (http://\S+)/summarize", log.read_text(encoding="utf-8")):
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


@dataclass(frozen=True)
class Scrape:
    """The server's metrics at one moment."""

    text: str

    def __getitem__(self, name: str) -> float:
        """The sum over the labels of one metric's samples."""
        return sum(sample.value for sample in self._samples(name))

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is admitted."""
        return all(self[name] == value for name, value in IDLE.items())

    def by_status(self, *without: str) -> dict[int, int]:
        """HTTP requests answered, for each status, `without` some routes."""
        counts: dict[int, int] = {}
        for sample in self._samples("precis_requests_total"):
            if sample.labels["route"] not in without:
                status = int(sample.labels["status"])
                counts[status] = counts.get(status, 0) + int(sample.value)
        return counts

    def _samples(self, name: str) -> list[Sample]:
        families = text_string_to_metric_families(self.text)
        found = [s for family in families for s in family.samples if s.name == name]
        return [Sample(dict(sample.labels), float(sample.value)) for sample in found]


@dataclass(frozen=True)
class Sample:
    """One line of `/metrics`."""

    labels: dict[str, str]
    value: float


async def scrape(url: str) -> Scrape:
    """Ask for the metrics on a connection of its own, which is closed."""
    async with httpx.AsyncClient(timeout=30) as client:
        return Scrape((await client.get(f"{url}/metrics")).raise_for_status().text)


async def settled(url: str, seconds: float = 30.0) -> Scrape:
    """The metrics as soon as nothing runs, waits or is admitted; after `seconds`, as they are."""
    until = time.monotonic() + seconds
    while True:
        found = await scrape(url)
        if found.idle or time.monotonic() > until:
            return found
        await asyncio.sleep(0.1)


async def at_rest(server: Server, enough: Callable[[Footprint], bool], seconds: float = 10.0) -> Rest:
    """The footprint as soon as it is small `enough` and its memory has been level for a while; else after `seconds`."""
    until = time.monotonic() + seconds
    still = server.footprint()
    while True:
        found = server.footprint()
        if (found.own, found.file) != (still.own, still.file):
            still = found
        if enough(found) and found.at - still.at >= STILL_SECONDS:
            return Rest(found, reached=True)
        if found.at > until:
            return Rest(found, reached=False)
        await asyncio.sleep(0.1)
