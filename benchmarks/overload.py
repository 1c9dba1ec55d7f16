"""Three times more than the server can do: `python -m benchmarks.overload [--factor 3] [--seconds 120]`.

Starts the real server with room for `--requests` requests. Capacity comes first: a closed loop of as many callers keeps
the queue full without a refusal, and what is answered a second is the capacity. Then an open loop: arrivals of a seeded
Poisson process at `--factor` times capacity, whatever becomes of those before. Then the closed loop again, because a
machine's speed drifts; goodput is held against the mean of the two. A loop's first fifth is left out of every rate.

Latency counts from when an arrival was due, so that a late generator does not flatter the server. Its bound: with
`--requests` in the server, answered in turn, an accepted one waits for at most that many answers, requests / capacity
seconds, and then for its own: the longest encoding and decoding that the first closed loop saw comes on top.

A 429's `Retry-After` is honest if within the announced seconds a place became free (an answer went out after the
refusal), and if it did not announce a whole second more than that took, rounded up. Who gets that place is another
matter while others arrive at three times capacity: every tenth of the refused comes back when told, and the table shows
how many were accepted, beside the others. When the load is over, the last one refused comes back when told: accepted.

The caller shares the machine with the server: its share of the cores is printed for each loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import traffic
from benchmarks.criteria import Criterion, show
from benchmarks.report import Report, cores, significant

TEXTS = 57  # three of each length
LEFT_OUT = 0.2  # of each loop, until it is steady
COME_BACK = 0.1  # of the refused
HONEST = 0.95  # of the announcements: what the caller sees is some milliseconds behind
GOODPUT = 0.1  # below capacity
PUNCTUAL = 0.1  # seconds: a later generator is not an open loop
TIMEOUT = 120.0  # seconds: a caller that is not answered by then counts as broken


@dataclass(frozen=True)
class Plan:
    """What is asked of the server.

    Attributes:
        factor: arrivals a second over capacity.
        seconds: of arrivals.
        capacity_seconds: of each closed loop.
        requests: room in the server.
        options: of each request's decoding; none are the checkpoint's own.
        settings: of the server, beside its room.
    """

    factor: float = 3.0
    seconds: float = 120.0
    capacity_seconds: float = 30.0
    requests: int = 32
    seed: int = 0
    options: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One request as its caller saw it; seconds on `time.perf_counter()`.

    Attributes:
        status: 0 where the connection broke, or the reply was not a summary.
        service: seconds of encoding and decoding, as the server says.
        again: it came back after a refusal.
    """

    due: float
    sent: float
    done: float
    status: int
    retry_after: int | None = None
    service: float = 0.0
    again: bool = False


@dataclass(frozen=True)
class Loop:
    """What one loop saw, and how much of the cores its caller and the server took."""

    began: float
    seconds: float
    outcomes: list[Outcome]
    caller_share: float
    server_share: float

    @property
    def accepted(self) -> list[Outcome]:
        """The answered."""
        return [outcome for outcome in self.outcomes if outcome.status == 200]

    @property
    def refused(self) -> list[Outcome]:
        """The 429s."""
        return [outcome for outcome in self.outcomes if outcome.status == 429]

    def steady(self, moment: float) -> bool:
        """Whether it counts for rates."""
        return self.began + LEFT_OUT * self.seconds <= moment < self.began + self.seconds

    def rate(self) -> float:
        """Answers a second."""
        return sum(self.steady(o.done) for o in self.accepted) / ((1 - LEFT_OUT) * self.seconds)


@dataclass(frozen=True)
class Measured:
    """Everything one run saw."""

    plan: Plan
    before: Loop
    load: Loop
    after: Loop
    last: Outcome | None
    rest: traffic.Scrape
    errors: list[str]
    exit_status: int

    @property
    def capacity(self) -> float:
        """Answers a second with a full queue and nobody refused."""
        return (self.before.rate() + self.after.rate()) / 2

    @property
    def bound(self) -> float:
        """Most seconds that an accepted request may take."""
        return self.plan.requests / self.capacity + max(outcome.service for outcome in self.before.accepted)


def main() -> int:
    """Measure and print; 1 if a criterion is not met."""
    args = _arguments()
    plan = Plan(args.factor, args.seconds, args.capacity_seconds, args.requests, args.seed)
    report = Report(f"{plan.factor:g} times capacity")
    measured = run(plan)
    report.say(
        f"Room for {plan.requests} requests; {TEXTS} conversations of 2 to 20 turns, the checkpoint's own options. "
        f"Closed loops of {plan.requests} callers for {plan.capacity_seconds:g} s, arrivals for {plan.seconds:g} s; "
        f"the first {LEFT_OUT:.0%} of each is left out of rates. CPU: of {cores()} cores."
    )
    loops = {"capacity before": measured.before, "overload": measured.load, "capacity after": measured.after}
    report.table(
        [
            "",
            *("requests", "answered", "refused", "other", "answers/s"),
            *("p50 s", "p95 s", "p99 s", "max s", "callers' CPU", "server's CPU"),
        ],
        [loop_row(name, loop) for name, loop in loops.items()],
    )
    report.say(arrivals(measured))
    criteria = judge(measured)
    show(report, criteria)
    rows = {name: loop_plain(loop) for name, loop in loops.items()}
    results = {"plan": vars(plan), "capacity": significant(measured.capacity), "bound_s": significant(measured.bound)}
    report.finish({**results, "loops": rows, "criteria": [c.plain() for c in criteria]}, args.output)
    return 0 if all(criterion.met for criterion in criteria) else 1


def run(plan: Plan) -> Measured:
    """The three loops on a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_queue_requests": plan.requests, **plan.settings}
        with traffic.serve(Path(folder) / "log", **settings) as server:
            before, load, last, after, rest = asyncio.run(_loops(server, plan))
            status = server.stop()
            return Measured(plan, before, load, after, last, rest, server.logged_errors(), status)


async def _loops(server: traffic.Server, plan: Plan) -> tuple[Loop, Loop, Outcome | None, Loop, traffic.Scrape]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, limits=limits) as client:
        texts, parameters = traffic.conversations(TEXTS, plan.seed), {"generate_parameters": plan.options}
        caller = _Caller(client, [json.dumps({"inputs": text, "parameters": parameters}).encode() for text in texts])
        before = await _closed(server, caller, plan)
        if not before.rate():
            raise SystemExit("nothing was answered in the first loop's steady part; give it more --capacity-seconds")
        print(f"capacity: {before.rate():.2f} answers/s", file=sys.stderr, flush=True)
        load, last = await _open(server, caller, plan, plan.factor * before.rate())
        print(f"goodput: {load.rate():.2f} answers/s", file=sys.stderr, flush=True)
        after = await _closed(server, caller, plan)
    return before, load, last, after, await traffic.settled(server.url)


class _Caller:
    """Sends one text after the other, round and round, so that every stretch holds the same mix."""

    def __init__(self, client: httpx.AsyncClient, bodies: Sequence[bytes]) -> None:
        self._client = client
        self._bodies = cycle(bodies)

    async def ask(self, due: float, again: bool = False) -> Outcome:
        """One request, now."""
        sent = time.perf_counter()
        status, retry_after, service = 0, None, 0.0
        try:
            headers = {"content-type": "application/json"}
            reply = await self._client.post("/summarize", content=next(self._bodies), headers=headers)
            status = reply.status_code
            if status == 200:
                (item,) = reply.json()
                service = float(reply.headers["x-inference-time"]) / 1e3
                status = 200 if isinstance(item["summary_text"], str) else 0
            elif status == 429:
                retry_after = _whole_seconds(reply.headers.get("retry-after", ""))
        except (httpx.TransportError, ValueError, KeyError):
            status = 0
        return Outcome(due, sent, time.perf_counter(), status, retry_after, service, again)


def _whole_seconds(value: str) -> int | None:
    return int(value) if value.isdecimal() and int(value) >= 1 else None


async def _closed(server: traffic.Server, caller: _Caller, plan: Plan) -> Loop:
    """As many callers as there is room for, each with one request at a time."""
    watch = _Watch(server)
    until = watch.began + plan.capacity_seconds
    outcomes: list[Outcome] = []

    async def one() -> None:
        while (now := time.perf_counter()) < until:
            outcomes.append(await caller.ask(now))

    await asyncio.gather(*(one() for _ in range(plan.requests)))
    return watch.loop(plan.capacity_seconds, outcomes)


async def _open(server: traffic.Server, caller: _Caller, plan: Plan, rate: float) -> tuple[Loop, Outcome | None]:
    """Arrivals at their own times, and the last refused one again after the others."""
    generator = random.Random(plan.seed)
    gaps = np.random.default_rng(plan.seed).exponential(1 / rate, size=math.ceil(2 * rate * plan.seconds) + 20)
    dues = [due for due in np.cumsum(gaps).tolist() if due < plan.seconds]
    watch = _Watch(server)
    outcomes: list[Outcome] = []

    async def arrive(due: float, comes_back: bool) -> None:
        outcome = await caller.ask(due)
        outcomes.append(outcome)
        back = outcome.done + (outcome.retry_after or 0)
        if comes_back and outcome.retry_after and back < watch.began + plan.seconds:
            await asyncio.sleep(back - time.perf_counter())
            outcomes.append(await caller.ask(back, again=True))

    async with asyncio.TaskGroup() as group:
        for due in dues:
            await asyncio.sleep(watch.began + due - time.perf_counter())
            group.create_task(arrive(watch.began + due, generator.random() < COME_BACK))
        last = group.create_task(_last_refused(caller, outcomes))
    return watch.loop(plan.seconds, outcomes), last.result()


async def _last_refused(caller: _Caller, outcomes: Sequence[Outcome]) -> Outcome | None:
    """Send the request that was refused last once more, exactly when it was told to come."""
    refused = [outcome for outcome in outcomes if outcome.retry_after]
    if not refused:
        return None
    back = refused[-1].done + (refused[-1].retry_after or 0)
    await asyncio.sleep(back - time.perf_counter())
    return await caller.ask(back, again=True)


class _Watch:
    """A loop's beginning, and what both processes had computed by then."""

    def __init__(self, server: traffic.Server) -> None:
        self._server = server
        self.began = time.perf_counter()
        self._caller_cpu, self._server_cpu = time.process_time(), server.cpu_seconds()

    def loop(self, seconds: float, outcomes: list[Outcome]) -> Loop:
        """The loop that ends here."""
        whole = (time.perf_counter() - self.began) * cores()
        caller, server = time.process_time() - self._caller_cpu, self._server.cpu_seconds() - self._server_cpu
        return Loop(self.began, seconds, outcomes, caller / whole, server / whole)


def room_after(load: Loop) -> list[tuple[Outcome, float]]:
    """For each refusal of the steady part, the seconds until an answer went out and left its place."""
    freed = sorted(outcome.done for outcome in load.accepted)
    pairs = []
    for outcome in load.refused:
        index = int(np.searchsorted(freed, outcome.done, side="right"))
        if load.steady(outcome.done) and index < len(freed):
            pairs.append((outcome, freed[index] - outcome.done))
    return pairs


def lateness(load: Loop) -> float:
    """Seconds from when a request was due to when it was sent, which 99 % of them kept."""
    return float(np.quantile([outcome.sent - outcome.due for outcome in load.outcomes], 0.99))


def judge(measured: Measured) -> list[Criterion]:
    """Every criterion of the run."""
    load, capacity = measured.load, measured.capacity
    every = [*measured.before.outcomes, *load.outcomes, *measured.after.outcomes]
    failed = sum(outcome.status >= 500 for outcome in every)
    odd = sum(outcome.status not in (200, 429) and outcome.status < 500 for outcome in every)
    rooms = room_after(load)
    announced = [(outcome.retry_after, room) for outcome, room in rooms]
    in_time = _share(after is not None and room <= after for after, room in announced)
    not_long = _share(after is not None and after <= math.ceil(room) + 1 for after, room in announced)
    missing = sum(outcome.retry_after is None for outcome in load.refused)
    slowest = max((o.done - o.due for o in load.accepted), default=math.inf)
    goodput, least = load.rate(), (1 - GOODPUT) * capacity
    left = {name: measured.rest[name] for name in traffic.IDLE}
    last = "nobody was refused" if measured.last is None else str(measured.last.status)
    return [
        Criterion("no 5xx", str(failed), "0", failed == 0),
        Criterion("every connection answered, 200 or 429", f"{odd} others", "0", odd == 0),
        Criterion(
            "no crash, no error logged",
            f"exit {measured.exit_status}, {len(measured.errors)} errors",
            "exit 0, 0 errors",
            measured.exit_status == 0 and not measured.errors,
        ),
        Criterion(
            "latency of the accepted",
            f"at most {slowest:.2f} s",
            f"at most {measured.bound:.2f} s",
            slowest <= measured.bound,
        ),
        Criterion("the rest refused", f"{len(load.refused)} times 429", "some", bool(load.refused)),
        Criterion("429 with Retry-After", f"{missing} without", "0", missing == 0),
        Criterion("room within Retry-After", f"{in_time:.1%}", f"at least {HONEST:.0%}", in_time >= HONEST),
        Criterion("Retry-After no longer than that", f"{not_long:.1%}", f"at least {HONEST:.0%}", not_long >= HONEST),
        Criterion(
            "the last refused, back when told",
            last,
            "200",
            measured.last is not None and measured.last.status == 200,
        ),
        Criterion(
            f"goodput of {capacity:.2f}/s",
            f"{goodput:.2f}/s ({goodput / capacity:.1%})",
            f"at least {least:.2f}/s",
            goodput >= least,
        ),
        Criterion("nothing left inside", _words(left), "0", not any(left.values())),
        Criterion(
            "arrivals punctual, 99 %",
            f"at most {1e3 * lateness(load):.1f} ms late",
            f"at most {1e3 * PUNCTUAL:.0f} ms",
            lateness(load) <= PUNCTUAL,
        ),
    ]


def _words(values: dict[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('precis_')} {value:g}" for name, value in values.items())


def _share(truths: Iterable[bool]) -> float:
    held = list(truths)
    return sum(held) / len(held) if held else 0.0


def arrivals(measured: Measured) -> str:
    """What became of those who came back, what was announced, and how punctual the generator was."""
    load = measured.load
    fresh, back = ([o for o in load.outcomes if o.again is again] for again in (False, True))
    accepted = [_share(outcome.status == 200 for outcome in group) for group in (fresh, back)]
    counts: dict[int, int] = {}
    for outcome in load.refused:
        counts[outcome.retry_after or 0] = counts.get(outcome.retry_after or 0, 0) + 1
    words = ", ".join(f"{seconds} s {count} times" for seconds, count in sorted(counts.items()))
    rooms = [room for _, room in room_after(load)]
    room = f"{np.median(rooms):.2f} s in the median, {max(rooms):.2f} s at most" if rooms else "never asked"
    offered = len(fresh) / measured.plan.seconds
    times = offered / measured.before.rate()
    return (
        f"Offered: {offered:.2f} new requests a second, {times:.2f} times what the first loop saw. "
        f"Accepted of these: {accepted[0]:.0%}; of the {len(back)} that came back: {accepted[1]:.0%}. "
        f"Announced: {words or 'nothing'}. Until there was room: {room}."
    )


def loop_row(name: str, loop: Loop) -> list[object]:
    """One line of the table."""
    others = len(loop.outcomes) - len(loop.accepted) - len(loop.refused)
    return [
        name,
        *(len(loop.outcomes), len(loop.accepted), len(loop.refused), others, f"{loop.rate():.2f}"),
        *(f"{value:.2f}" for value in _latencies(loop)),
        *(f"{loop.caller_share:.0%}", f"{loop.server_share:.0%}"),
    ]


def loop_plain(loop: Loop) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "requests": len(loop.outcomes),
        "answered": len(loop.accepted),
        "refused": len(loop.refused),
        "answers_per_second": significant(loop.rate()),
        "latency_s_p50_p95_p99_max": [significant(value) for value in _latencies(loop)],
        "caller_cpu_share": round(loop.caller_share, 3),
        "server_cpu_share": round(loop.server_share, 3),
    }


def _latencies(loop: Loop) -> list[float]:
    seconds = [outcome.done - outcome.due for outcome in loop.accepted] or [math.nan]
    return [float(value) for value in np.quantile(seconds, [0.5, 0.95, 0.99, 1.0])]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=3.0, help="arrivals over capacity")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals")
    parser.add_argument("--capacity-seconds", type=float, default=30.0, help="of each closed loop")
    parser.add_argument("--requests", type=int, default=32, help="PRECIS_MAX_QUEUE_REQUESTS of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
