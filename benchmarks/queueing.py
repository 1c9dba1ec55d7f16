"""A discrete-event model of replicas that batch in flight, of routers and of an autoscaler; its seconds are its own.

An engine has slots. Texts in slots share its speed alike, and the speed depends on how many there are: that is what
decoding them together means. Others wait, first come, first served. A request is one text or several, for one replica;
it is answered when its last text is done. Knows no HTTP, no model and no measurement: `benchmarks.simulate` brings
those in, and holds the outcome against a real run.

Every arrival changes when all other texts of its replica end, so ends are a heap of (time, version) and those of an old
version are passed over; an event of simpy's cannot be moved (ADR 15).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np

Speed = Callable[[int], float]


@dataclass
class Request:
    """What a caller sends, and when.

    Attributes:
        works: of each text, the seconds that it takes alone.
        tokens: what routers count, of all texts together.
    """

    at: float
    works: Sequence[float]
    tokens: float
    replica: int = -1
    left: int = 0
    done: float = math.nan

    @property
    def seconds(self) -> float:
        """From its arrival to its answer."""
        return self.done - self.at


class Replica:
    """One engine.

    Args:
        slots: texts that run together.
        speed: of the whole engine with so many texts in it; 1 is that of one text alone.
    """

    def __init__(self, slots: int, speed: Speed) -> None:
        self._slots = slots
        self._speed = speed
        self._clock = 0.0  # seconds alone that a text which ran since the beginning would have got
        self._since = 0.0
        self._factor = 1.0
        self._ends: list[tuple[float, int, Request]] = []
        self._numbers = count()
        self._waiting: deque[tuple[float, Request]] = deque()
        self.version = 0
        self.tokens = 0.0
        self.requests = 0

    @property
    def texts(self) -> int:
        """That run or wait."""
        return len(self._ends) + len(self._waiting)

    @property
    def running(self) -> int:
        """Texts in slots."""
        return len(self._ends)

    def add(self, request: Request, now: float) -> None:
        """A request arrives."""
        self._advance(now)
        request.left = len(request.works)
        self.tokens += request.tokens
        self.requests += 1
        self._waiting.extend((work, request) for work in request.works)
        self._fill()

    def finish(self, now: float) -> Request | None:
        """The text whose time it is ends; its request, if that was the last one of it."""
        self._advance(now)
        _, _, request = heapq.heappop(self._ends)
        request.left -= 1
        self._fill()
        if request.left:
            return None
        request.done = now
        self.tokens -= request.tokens
        self.requests -= 1
        return request

    def slow(self, factor: float, now: float) -> None:
        """From now on everything takes longer, because others compute on the same cores."""
        if factor != self._factor:
            self._advance(now)
            self._factor = factor
            self.version += 1

    def next_end(self) -> float:
        """When a text will end if nothing else happens; infinity for none."""
        if not self._ends:
            return math.inf
        return self._since + max(0.0, self._ends[0][0] - self._clock) / self._rate()

    def _rate(self) -> float:
        running = len(self._ends)
        return self._factor * self._speed(running) / running

    def _advance(self, now: float) -> None:
        if self._ends:
            self._clock += (now - self._since) * self._rate()
        self._since = now

    def _fill(self) -> None:
        while self._waiting and len(self._ends) < self._slots:
            work, request = self._waiting.popleft()
            heapq.heappush(self._ends, (self._clock + work, next(self._numbers), request))
        self.version += 1


class Router(Protocol):
    """Chooses a replica for a request, and hears when it is answered."""

    def choose(self, request: Request, replicas: Sequence[Replica], ready: Sequence[int], now: float) -> int: ...  # noqa: D102
    def answered(self, request: Request) -> None: ...  # noqa: D102


class RandomRouter:
    """Whatever the load; what a Kubernetes Service does with connections."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._draw = _Draw(generator)

    def choose(self, request: Request, replicas: Sequence[Replica], ready: Sequence[int], now: float) -> int:
        """Any."""
        return ready[self._draw.below(len(ready))]

    def answered(self, request: Request) -> None:
        """Nothing is kept."""


class RequestsRouter:
    """Power of two choices by requests under way, known exactly, which nobody with several proxies has."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._draw = _Draw(generator)

    def choose(self, request: Request, replicas: Sequence[Replica], ready: Sequence[int], now: float) -> int:
        """Of two, the one with fewer."""
        first, second = self._draw.two(ready)
        return min(first, second, key=lambda index: replicas[index].requests)

    def answered(self, request: Request) -> None:
        """Nothing is kept."""


class ServeRouter:
    """Power of two choices by requests under way, as Ray Serve's proxies know them.

    A proxy learns a replica's number when it sends it a request, and counts its own answers down; what others send
    meanwhile it does not see. An entry that is `MAX_AGE` old is asked for anew.

    Args:
        routers: proxies, among which requests are divided by chance.
    """

    MAX_AGE = 10.0  # RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S

    def __init__(self, generator: np.random.Generator, routers: int = 1) -> None:
        self._draw = _Draw(generator)
        self._known: list[dict[int, tuple[float, int]]] = [{} for _ in range(routers)]
        self._router_of: dict[int, int] = {}

    def choose(self, request: Request, replicas: Sequence[Replica], ready: Sequence[int], now: float) -> int:
        """Of two, the one that is said to have fewer."""
        router = self._draw.below(len(self._known))
        first, second = self._draw.two(ready)
        chosen = min(first, second, key=lambda index: self._length(router, index, replicas[index], now))
        self._known[router][chosen] = (now, replicas[chosen].requests + 1)
        self._router_of[id(request)] = router
        return chosen

    def answered(self, request: Request) -> None:
        """One of its own is done."""
        known = self._known[self._router_of.pop(id(request))]
        at, length = known[request.replica]
        known[request.replica] = (at, max(0, length - 1))

    def _length(self, router: int, index: int, replica: Replica, now: float) -> int:
        at, length = self._known[router].get(index, (-math.inf, 0))
        if now - at > self.MAX_AGE:
            length = replica.requests
            self._known[router][index] = (now, length)
        return length


class TokensRouter:
    """Power of two choices by source tokens, as `deploy/ray/routing.py` does it.

    Args:
        routers: proxies, among which requests are divided by chance; each knows its own exactly.
        period: seconds between an engine's reports, out of which each proxy takes what the others sent.
    """

    def __init__(self, generator: np.random.Generator, routers: int = 1, period: float = 1.0) -> None:
        self._draw = _Draw(generator)
        self._period = period
        self._own: list[dict[int, float]] = [{} for _ in range(routers)]
        self._others: list[dict[int, tuple[int, float]]] = [{} for _ in range(routers)]
        self._reports: dict[int, tuple[int, float]] = {}
        self._router_of: dict[int, int] = {}

    def choose(self, request: Request, replicas: Sequence[Replica], ready: Sequence[int], now: float) -> int:
        """Of two, the one with fewer."""
        router = self._draw.below(len(self._own))
        first, second = self._draw.two(ready)
        chosen = min(first, second, key=lambda index: self._load(router, index, replicas[index], now))
        self._own[router][chosen] = self._own[router].get(chosen, 0.0) + request.tokens
        self._router_of[id(request)] = router
        return chosen

    def answered(self, request: Request) -> None:
        """What it sent is done."""
        self._own[self._router_of.pop(id(request))][request.replica] -= request.tokens

    def _load(self, router: int, index: int, replica: Replica, now: float) -> float:
        own = self._own[router].get(index, 0.0)
        if len(self._own) == 1:
            return own
        number = int(now / self._period)
        # A report is taken at the first look in its period: as late as its way from the engine to the proxies.
        if self._reports.get(index, (-1, 0.0))[0] != number:
            self._reports[index] = (number, replica.tokens)
        if self._others[router].get(index, (-1, 0.0))[0] != number:
            self._others[router][index] = (number, max(0.0, self._reports[index][1] - own))
        return own + self._others[router][index][1]


@dataclass(frozen=True)
class Autoscaling:
    """As `deploy/ray/application.py` is told.

    Attributes:
        startup: seconds from a replica's order to its first request.
    """

    least: int
    most: int
    texts_per_replica: float
    look_back: float = 10.0
    interval: float = 2.0
    upscale_delay: float = 10.0
    downscale_delay: float = 300.0
    startup: float = 10.0


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        requests: all of them, answered.
        sizes: (from when, so many replicas), in order of time.
        ended: when the last was answered.
    """

    requests: list[Request]
    sizes: list[tuple[float, int]]
    ended: float

    def latencies(self, since: float = 0.0, until: float = math.inf) -> list[float]:
        """Of requests that arrived then."""
        return [request.seconds for request in self.requests if since <= request.at < until]

    def replica_seconds(self) -> float:
        """Paid for."""
        ends = [*(at for at, _ in self.sizes[1:]), self.ended]
        return sum((end - at) * size for (at, size), end in zip(self.sizes, ends, strict=True))


@dataclass
class _State:
    replicas: list[Replica]
    ready: list[int]
    events: list[tuple[float, int, int, int]] = field(default_factory=list)


def simulate(
    requests: Iterable[Request],
    replicas: int,
    slots: int,
    speed: Speed,
    router: Router,
    contention: Callable[[Sequence[int]], float] | None = None,
    autoscaling: Autoscaling | None = None,
) -> Outcome:
    """Answer every request.

    Args:
        requests: in order of arrival.
        contention: speed of each replica, by the texts that run in each of them; None where each has cores of its own.
    """
    state = _State([Replica(slots, speed) for _ in range(replicas)], list(range(replicas)))
    scaler = _Scaler(autoscaling, state, slots, speed) if autoscaling else None
    arrivals, served = iter(requests), list[Request]()
    upcoming = next(arrivals, None)
    sizes = [(0.0, replicas)]
    now, under_way = 0.0, 0
    while upcoming is not None or under_way:
        while state.events and state.replicas[state.events[0][2]].version != state.events[0][3]:
            heapq.heappop(state.events)  # something has happened to that replica since
        ends = state.events[0][0] if state.events else math.inf
        arrives = upcoming.at if upcoming is not None else math.inf
        ticks = scaler.next_tick if scaler else math.inf
        now = min(ends, arrives, ticks)
        if now == ticks and scaler is not None:
            if scaler.tick(now):
                sizes.append((now, scaler.paid))
            continue
        if now == arrives and upcoming is not None:
            index = router.choose(upcoming, state.replicas, state.ready, now)
            upcoming.replica = index
            state.replicas[index].add(upcoming, now)
            served.append(upcoming)
            under_way += 1
            upcoming = next(arrivals, None)
        else:
            index = heapq.heappop(state.events)[2]
            answered = state.replicas[index].finish(now)
            if answered is not None:
                under_way -= 1
                router.answered(answered)
        touched = [index]
        if contention is not None:
            factor = contention([replica.running for replica in state.replicas])
            touched = list(range(len(state.replicas)))
            for other in touched:
                state.replicas[other].slow(factor, now)
        for other in touched:
            replica = state.replicas[other]
            if math.isfinite(replica.next_end()):
                heapq.heappush(state.events, (replica.next_end(), len(served), other, replica.version))
    return Outcome(served, sizes, now)


class _Scaler:
    """Ray Serve's loop around `EngineQueuePolicy`: a mean over the look-back, and delays in either direction."""

    def __init__(self, plan: Autoscaling, state: _State, slots: int, speed: Speed) -> None:
        self.plan = plan
        self.next_tick = plan.interval
        self.paid = len(state.ready)
        self._state, self._slots, self._speed = state, slots, speed
        self._seen: deque[tuple[float, int]] = deque()
        self._starting: list[float] = []
        self._wanted_since: tuple[int, float] | None = None  # up or down, since when

    def tick(self, now: float) -> bool:
        """Look, and decide; whether the number that is paid for has changed."""
        self.next_tick = now + self.plan.interval
        state, plan = self._state, self.plan
        for _ in [at for at in self._starting if at <= now]:
            state.ready.append(len(state.replicas))
            state.replicas.append(Replica(self._slots, self._speed))
            state.replicas[-1]._since = now
        self._starting = [at for at in self._starting if at > now]
        self._seen.append((now, sum(replica.texts for replica in state.replicas)))
        while self._seen[0][0] <= now - plan.look_back:
            self._seen.popleft()
        texts = sum(seen for _, seen in self._seen) / len(self._seen)
        wanted = min(plan.most, max(plan.least, math.ceil(texts / plan.texts_per_replica)))
        direction = (wanted > self.paid) - (wanted < self.paid)
        if direction == 0:
            self._wanted_since = None
            return False
        if self._wanted_since is None or self._wanted_since[0] != direction:
            self._wanted_since = (direction, now)
        delay = plan.upscale_delay if direction > 0 else plan.downscale_delay
        if now - self._wanted_since[1] < delay:
            return False
        self._wanted_since = None
        self._starting += [now + plan.startup] * max(0, wanted - self.paid)
        for _ in range(self.paid - wanted):
            if self._starting:
                self._starting.pop()
            else:  # gets nothing more, and drains
                state.ready.pop()
        self.paid = wanted
        return True


class _Draw:
    """numpy's numbers by the thousand: one at a time they take longer than the rest of the model."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._held: list[float] = []

    def below(self, limit: int) -> int:
        """One of 0 .. limit - 1."""
        if not self._held:
            self._held = self._generator.random(4096).tolist()
        return int(self._held.pop() * limit)

    def two(self, among: Sequence[int]) -> tuple[int, int]:
        """Two that differ, in any order; the same twice where there is one."""
        first = self.below(len(among))
        if len(among) == 1:
            return among[0], among[0]
        second = self.below(len(among) - 1)
        return among[first], among[second + (second >= first)]


def interpolated(points: dict[int, float]) -> Speed:
    """A speed for every number of texts, straight lines between what was measured, level beyond."""
    xs, ys = sorted(points), [points[x] for x in sorted(points)]
    table = [0.0, *(float(np.interp(n, xs, ys)) for n in range(1, xs[-1] + 1))]
    return lambda running: table[min(running, len(table) - 1)]
