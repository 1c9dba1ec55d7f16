"""Forty minutes of everything at once, and what it leaves behind: `python -m benchmarks.soak [--rounds 40]`.

Starts the real server in float32, where an answer does not depend on the company it is decoded in, and asks for the
summaries of some texts, one at a time: the references. Then come rounds: `--seconds` of traffic by `--callers` mixed
callers (callers.py), with a sample of the process every `--every` seconds, and a rest of a few seconds. The rest is
over when nothing runs, no connection is open and memory has been level for a second; what the process holds then is a
reading.

The first quarter of the rounds is warm-up: its readings are kept, but not in the slope. Caches and threads get their
size in it. It ends with tokenising for every worker thread, and with a text of the greatest length for every slot, for
each set of options, because each kind of search has caches of its own, which take memory where they are written. The
process at rest after that is what the end is held against.

**Memory.** What is judged is the slope, over the readings at rest, of the process's own memory: RssAnon, RssShmem and
VmSwap. Its 95 % interval (slope.py) must hold zero, or lie below it. A wide interval holds zero whatever happens, so
a second criterion asks that it ends below what `LARGEST_LEAK` a request comes to. Readings at rest do not hide a
leak, they show it better: what a request leaves behind is still there when all have been answered, and what is in
flight, which is noise, is not. The one growth that they miss is one that a rest undoes; the samples under load are
reported beside them for that. RssFile need only stay below that bound: pages of libraries and weights are
counted when they are first touched, a file's pages are as many as it is large, and the kernel may take them back. RSS
is reported. PSS and USS would not do: they change with the other processes that map the same libraries. ADR 21 has
the reasons.

In the end: no text runs, waits or is admitted; threads and open files are what they were after the warm-up; as many
texts run at once as there are slots; the server has counted each request once that callers have sent, and each text.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import traffic
from benchmarks.callers import MAX_BATCH_SIZE, MAX_BODY_BYTES, OPTIONS, Callers, Ledger
from benchmarks.criteria import Criterion, show
from benchmarks.report import Report, significant
from benchmarks.slope import LEAST_SAMPLES, Slope, slope_of
from benchmarks.traffic import Footprint, Rest, Scrape

WARM_UP = 0.25
BURST = 64  # requests at once, for worker threads
KIB, MIB, HOUR = 2**10, 2**20, 3600.0
LARGEST_LEAK = KIB  # bytes a request
MEMORY = {"own": "RssAnon + RssShmem + VmSwap", "file": "RssFile", "rss": "RSS"}
OWN = "/metrics"  # asked for by this script, and not counted


@dataclass(frozen=True)
class Plan:
    """What is asked of the server.

    Attributes:
        rounds: of traffic, warm-up included.
        seconds: of traffic in each.
        every: seconds between two samples under load.
        references: texts whose summaries are asked for first, with each of the first `options` options.
        caches: whether the warm-up gives every cache its size, without which the slope of the memory means nothing.
    """

    rounds: int = 40
    seconds: float = 60.0
    callers: int = 8
    every: float = 5.0
    references: int = 12
    options: int = len(OPTIONS)
    caches: bool = True
    seed: int = 0

    @property
    def warm_up(self) -> int:
        """Rounds that come first and are not in the slope."""
        return round(WARM_UP * self.rounds)


@dataclass(frozen=True)
class Round:
    """The process while callers call, and at rest after that."""

    loaded: list[Footprint]
    rest: Rest


@dataclass(frozen=True)
class Measured:
    """Everything one run saw: the ledger, the process over time, and both before and after.

    Attributes:
        warming: the rounds of the warm-up.
        rounds: those after it.
        requests: that callers sent in these.
    """

    plan: Plan
    ledger: Ledger
    warming: list[Round]
    rounds: list[Round]
    requests: int
    warm: Rest
    end: Rest
    first: Scrape
    last: Scrape
    slots: int
    filled: int
    errors: list[str]
    exit_status: int

    @property
    def rests(self) -> list[Footprint]:
        """The readings after the warm-up."""
        return [one.rest.footprint for one in self.rounds]

    @property
    def loaded(self) -> list[Footprint]:
        """The samples after the warm-up."""
        return [sample for one in self.rounds for sample in one.loaded]

    @property
    def not_at_rest(self) -> int:
        """How often the process was read though it had not come to rest."""
        rests = [*(one.rest for one in [*self.warming, *self.rounds]), self.warm, self.end]
        return sum(not rest.reached for rest in rests)

    @property
    def largest_leak(self) -> float:
        """MiB an hour, of which more must be ruled out: `LARGEST_LEAK` for each request sent after the warm-up."""
        return LARGEST_LEAK / MIB * self.requests * HOUR / (self.rests[-1].at - self.warm.footprint.at)


def main() -> int:
    """Measure and print; 1 if a criterion is not met."""
    args = _arguments()
    plan = Plan(args.rounds, args.seconds, args.callers, args.every, caches=not args.trial, seed=args.seed)
    report = Report(f"{plan.rounds * plan.seconds / 60:g} minutes of mixed traffic")
    measured = run(plan)
    ledger = measured.ledger
    report.say(
        f"{plan.callers} callers, float32; {plan.rounds} rounds of {plan.seconds:g} s and a rest, "
        f"of which the first {plan.warm_up} are warm-up. "
        f"{plan.references} texts with {plan.options} sets of options as references."
    )
    report.table(["kind", "requests"], [[name, number] for name, number in sorted(ledger.kinds.items())])
    report.table(["status", "replies"], [[status, number] for status, number in sorted(ledger.replies.items())])
    series = {"at rest": measured.rests, "under load": measured.loaded}
    slopes = {when: {field: slope(held, field) for field in MEMORY} for when, held in series.items()}
    report.table(
        ["MiB", "", "first", "last", "least", "most", "slope, MiB/hour", "95 % interval"],
        [
            [name, when, *_extremes(held, field), f"{found[field].value:+.2f}", _interval(found[field])]
            for (when, held), found in zip(series.items(), slopes.values(), strict=True)
            for field, name in MEMORY.items()
        ],
    )
    report.say(
        f"At rest after the warm-up's last texts {measured.warm.footprint.own / MIB:.1f} MiB of {MEMORY['own']}, "
        f"at the end {measured.end.footprint.own / MIB:.1f}."
    )
    criteria = [*memory(slopes["at rest"], measured.largest_leak), *judge(measured)]
    show(report, criteria)
    start = measured.warm.footprint.at
    for words, number in Counter(ledger.faults).most_common(20):
        report.say(f"{number} times: {words}")
    report.finish(
        {
            "plan": vars(plan),
            "kinds": dict(ledger.kinds),
            "replies": dict(ledger.replies),
            "slope_mib_per_hour": {
                when: {field: [significant(part) for part in vars(one).values()] for field, one in found.items()}
                for when, found in slopes.items()
            },
            "seconds_and_mib": {
                "of": ["at", *MEMORY],
                "at rest in the warm-up": _plain([one.rest.footprint for one in measured.warming], start),
                **{when: _plain(held, start) for when, held in series.items()},
            },
            "criteria": [criterion.plain() for criterion in criteria],
        },
        args.output,
    )
    return 0 if all(criterion.met for criterion in criteria) else 1


def run(plan: Plan) -> Measured:
    """The traffic, on a server of its own."""
    settings = {"dtype": "float32", "max_body_bytes": MAX_BODY_BYTES, "max_batch_size": MAX_BATCH_SIZE}
    with (
        tempfile.TemporaryDirectory() as folder,
        traffic.serve(Path(folder) / "log", **settings) as server,
    ):
        return asyncio.run(_soak(server, plan))


async def _soak(server: traffic.Server, plan: Plan) -> Measured:
    alone = server.footprint()
    first = await traffic.scrape(server.url)
    callers = Callers(server.url, plan.references, plan.options, plan.seed)
    await callers.learn()
    slots = int(first["precis_slots"])
    warming = [await _round(server, callers, plan, alone.files) for _ in range(plan.warm_up)]
    await callers.fill_threads(BURST)
    if plan.caches:
        await callers.fill_caches(slots)
    warm = await _rest(server, alone.files)
    print("warm", file=sys.stderr, flush=True)
    sent = callers.ledger.sent
    rounds = [await _round(server, callers, plan, alone.files) for _ in range(plan.rounds - plan.warm_up)]
    requests = callers.ledger.sent - sent
    filled = await callers.fill_slots(slots)
    last = await traffic.settled(server.url)
    before = warm.footprint
    end = await traffic.at_rest(server, lambda now: now.files <= before.files and now.threads <= before.threads)
    status = server.stop()
    errors = server.logged_errors()
    ledger = callers.ledger
    return Measured(plan, ledger, warming, rounds, requests, warm, end, first, last, slots, filled, errors, status)


async def _round(server: traffic.Server, callers: Callers, plan: Plan, files: int) -> Round:
    """Traffic with samples, then a rest, which has so many open `files` at most."""
    sampler = asyncio.create_task(_sample(server, plan.every))
    await callers.call(plan.callers, plan.seconds)
    sampler.cancel()
    (samples,) = await asyncio.gather(sampler)
    return Round(samples, await _rest(server, files))


async def _rest(server: traffic.Server, files: int) -> Rest:
    """Nothing to do, no connection open (as many `files` as before the first came), and memory level."""
    settled = await traffic.settled(server.url)
    found = await traffic.at_rest(server, lambda now: now.files <= files)
    rest = Rest(found.footprint, reached=settled.idle and found.reached)
    words = "at rest" if rest.reached else "not at rest"
    print(f"{words}: {rest.footprint.own / MIB:.1f} MiB", file=sys.stderr, flush=True)
    return rest


async def _sample(server: traffic.Server, every: float) -> list[Footprint]:
    """Until cancelled."""
    samples: list[Footprint] = []
    try:
        while True:
            await asyncio.sleep(every)
            samples.append(server.footprint())
    except asyncio.CancelledError:
        return samples


def slope(held: Sequence[Footprint], field: str) -> Slope:
    """Of a footprint's bytes, in MiB an hour."""
    return slope_of([one.at for one in held], [getattr(one, field) for one in held]).times(HOUR / MIB)


def memory(at_rest: Mapping[str, Slope], largest_leak: float) -> list[Criterion]:
    """Of the slopes of own memory and of mapped files at rest, in MiB an hour."""
    own, file = at_rest["own"], at_rest["file"]
    return [
        Criterion(
            "own memory at rest",
            f"{own.value:+.2f} MiB/hour ({_interval(own)})",
            "zero within, or negative",
            own.low <= 0,
        ),
        *(
            Criterion(
                f"{name}: a leak of {LARGEST_LEAK / KIB:g} KiB a request is ruled out",
                f"{slope.high:+.2f} MiB/hour",
                f"less than {largest_leak:.1f}",
                slope.high < largest_leak,
            )
            for name, slope in (("own memory", own), ("mapped files", file))
        ),
    ]


def judge(measured: Measured) -> list[Criterion]:
    """Every criterion but memory's slopes, whose intervals take many rounds."""
    ledger, first, last = measured.ledger, measured.first, measured.last
    left = {name.removeprefix("precis_"): last[name] for name in traffic.IDLE}
    before, after = first.by_status(OWN), last.by_status(OWN)
    counted = {status: number - before.get(status, 0) for status, number in after.items()}
    surplus = {status: number - ledger.replies[status] for status, number in counted.items()}
    missing = [status for status in ledger.replies if status not in counted]
    texts = int(last["precis_texts_total"] - first["precis_texts_total"])
    expected = {200, 400, 404, 405, 406, 413, 415, 422, 504}
    odd = {status: number for status, number in ledger.replies.items() if status not in expected}
    errors = [line for line in measured.errors if "deadline-exceeded: DeadlineExceeded" not in line]
    return [
        Criterion("replies as they should be", f"{len(ledger.faults)} faults", "0", not ledger.faults),
        Criterion("no 5xx but the deadlines' 504", str(odd or "none"), "none", not odd),
        Criterion(
            "each request counted once",
            f"{sum(counted.values())} by the server; callers: {ledger.replies.total()} stayed, {ledger.left} left",
            "equal",
            sum(surplus.values()) == ledger.left and not missing and min(surplus.values()) >= 0,
        ),
        Criterion(
            "each text answered once",
            f"{texts} by the server, {ledger.texts} to callers that stayed",
            f"equal, but for {ledger.left_texts} of those that left",
            0 <= texts - ledger.texts <= ledger.left_texts,
        ),
        Criterion("summaries equal to their reference", f"{ledger.compared} compared", "some", ledger.compared > 0),
        Criterion("deadlines that passed", str(ledger.deadlines), "some", ledger.deadlines > 0),
        Criterion(
            "no slot leaked",
            ", ".join(f"{name} {value:g}" for name, value in left.items()),
            "0",
            not any(left.values()),
        ),
        Criterion(
            "all slots can be used",
            f"{measured.filled} at once",
            str(measured.slots),
            measured.filled == measured.slots,
        ),
        Criterion("every reading was at rest", f"{measured.not_at_rest} were not", "0", not measured.not_at_rest),
        _same("threads", measured.end.footprint.threads, measured.warm.footprint.threads),
        _same("open files", measured.end.footprint.files, measured.warm.footprint.files),
        Criterion(
            "no error logged, clean exit",
            f"{len(errors)} errors, exit {measured.exit_status}",
            "0, exit 0",
            not errors and measured.exit_status == 0,
        ),
    ]


def _same(name: str, now: int, before: int) -> Criterion:
    return Criterion(f"{name} as after the warm-up", str(now), str(before), now == before)


def _extremes(held: Sequence[Footprint], field: str) -> list[str]:
    """The first, last, least and most MiB."""
    sizes = [getattr(one, field) / MIB for one in held]
    return [f"{size:.1f}" for size in (sizes[0], sizes[-1], min(sizes), max(sizes))]


def _interval(found: Slope) -> str:
    return f"{found.low:+.2f} to {found.high:+.2f}"


def _plain(held: Sequence[Footprint], start: float) -> list[list[float]]:
    """For JSON: seconds after `start`, and MiB."""
    return [[round(one.at - start, 1), *(round(getattr(one, field) / MIB, 2) for field in MEMORY)] for one in held]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="warm-up included")
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic in a round")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples under load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", action="store_true", help="leave caches as they are: quick, and memory still grows")
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    args = parser.parse_args()
    if args.rounds - Plan(args.rounds).warm_up < LEAST_SAMPLES:
        parser.error(f"--rounds: an interval takes {LEAST_SAMPLES} after the warm-up")
    return args


if __name__ == "__main__":
    sys.exit(main())
