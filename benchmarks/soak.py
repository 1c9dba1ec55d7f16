"""Half an hour of everything at once, and what it leaves behind: `python -m benchmarks.soak [--minutes 30]`.

Starts the real server in float32, where an answer does not depend on the company it is decoded in, and asks for the
summaries of some texts, one at a time: the references. Then comes the warm-up, the first quarter of the time, with
`--callers` mixed callers (callers.py). Caches and threads get their size in it: it ends with tokenising for every
worker thread, and with a text of the greatest length for every slot, for each set of options, because each kind of
search has caches of its own, which take memory where they are written. A pause: the process at rest, with nothing
running, no connection open and its memory level, is what the end is held against. Then the same traffic for the other
three quarters, with a sample of the process every `--every` seconds.

The slope of the resident memory is over the samples after the warm-up, with its 95 % interval (slope.py); what is asked
is that zero lies within it, or that it is negative. PSS and USS are printed beside it. Then the traffic ends, and: no
text runs, waits or is admitted; threads and open files are what they were in the pause; as many texts run at once as
there are slots; the server has counted each request once that callers have sent, and each text.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks import traffic
from benchmarks.callers import MAX_BATCH_SIZE, MAX_BODY_BYTES, OPTIONS, Callers, Ledger
from benchmarks.criteria import Criterion, show
from benchmarks.report import Report, significant
from benchmarks.slope import Slope, slope_of
from benchmarks.traffic import Footprint, Scrape

WARM_UP = 0.25
BURST = 64  # requests at once, for worker threads
MIB, HOUR = 2**20, 3600.0
OWN = "/metrics"  # asked for by this script, and not counted


@dataclass(frozen=True)
class Plan:
    """What is asked of the server.

    Attributes:
        seconds: of traffic, warm-up included.
        every: seconds between two samples.
        references: texts whose summaries are asked for first, with each of the first `options` options.
        caches: whether the warm-up gives every cache its size, without which the slope of the memory means nothing.
    """

    seconds: float = 1800.0
    callers: int = 8
    every: float = 5.0
    references: int = 12
    options: int = len(OPTIONS)
    caches: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """Everything one run saw: the ledger, the process over time, and both before and after."""

    plan: Plan
    ledger: Ledger
    samples: list[Footprint]
    warm: Footprint
    end: Footprint
    first: Scrape
    last: Scrape
    slots: int
    filled: int
    errors: list[str]
    exit_status: int

    def slope(self, field: str) -> Slope:
        """Of a footprint's bytes, in MiB an hour."""
        times = [sample.at for sample in self.samples]
        return slope_of(times, [getattr(sample, field) for sample in self.samples]).times(HOUR / MIB)


def main() -> int:
    """Measure and print; 1 if a criterion is not met."""
    args = _arguments()
    plan = Plan(args.minutes * 60, args.callers, args.every, seed=args.seed)
    report = Report(f"{args.minutes:g} minutes of mixed traffic")
    measured = run(plan)
    ledger = measured.ledger
    report.say(
        f"{plan.callers} callers, float32; the first {WARM_UP:.0%} of the time is warm-up. "
        f"{plan.references} texts with {plan.options} sets of options as references."
    )
    report.table(["kind", "requests"], [[name, number] for name, number in sorted(ledger.kinds.items())])
    report.table(["status", "replies"], [[status, number] for status, number in sorted(ledger.replies.items())])
    report.table(
        ["", "after warm-up", "end, at rest", "least", "most", "slope, MiB/hour", "95 % interval"],
        [
            [
                field.upper() + ", MiB",
                *(f"{getattr(held, field) / MIB:.1f}" for held in (measured.warm, measured.end)),
                *(f"{pick(getattr(s, field) for s in measured.samples) / MIB:.1f}" for pick in (min, max)),
                f"{measured.slope(field).value:+.2f}",
                f"{measured.slope(field).low:+.2f} to {measured.slope(field).high:+.2f}",
            ]
            for field in ("rss", "pss", "uss")
        ],
    )
    criteria = [memory(measured), *judge(measured)]
    show(report, criteria)
    for words, number in Counter(ledger.faults).most_common(20):
        report.say(f"{number} times: {words}")
    slopes = {field: _plain(measured.slope(field)) for field in ("rss", "pss", "uss")}
    samples = [[round(s.at - measured.samples[0].at, 1), round(s.rss / MIB, 2)] for s in measured.samples]
    report.finish(
        {
            "plan": vars(plan),
            "kinds": dict(ledger.kinds),
            "replies": dict(ledger.replies),
            "slope_mib_per_hour": slopes,
            "rss_mib": samples,
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
    await callers.call(plan.callers, WARM_UP * plan.seconds)
    await callers.fill_threads(BURST)
    if plan.caches:
        await callers.fill_caches(slots)
    await traffic.settled(server.url)
    # With no connection open, as before the first came.
    warm = await traffic.at_rest(server, lambda now: now.files <= alone.files)
    print(f"warm: {warm.rss / MIB:.0f} MiB", file=sys.stderr, flush=True)
    sampler = asyncio.create_task(_sample(server, plan.every))
    await callers.call(plan.callers, (1 - WARM_UP) * plan.seconds)
    sampler.cancel()
    (samples,) = await asyncio.gather(sampler)
    filled = await callers.fill_slots(slots)
    last = await traffic.settled(server.url)
    end = await traffic.at_rest(server, lambda now: now.files <= warm.files and now.threads <= warm.threads)
    status = server.stop()
    errors = server.logged_errors()
    return Measured(plan, callers.ledger, samples, warm, end, first, last, slots, filled, errors, status)


async def _sample(server: traffic.Server, every: float) -> list[Footprint]:
    """Until cancelled."""
    samples: list[Footprint] = []
    try:
        while True:
            await asyncio.sleep(every)
            samples.append(server.footprint())
            seconds = time.monotonic() - samples[0].at
            if len(samples) % 12 == 0:
                print(f"{seconds:.0f} s: {samples[-1].rss / MIB:.1f} MiB", file=sys.stderr, flush=True)
    except asyncio.CancelledError:
        return samples


def memory(measured: Measured) -> Criterion:
    """The slope of the resident memory."""
    slope = measured.slope("rss")
    words = f"{slope.value:+.2f} MiB/hour ({slope.low:+.2f} to {slope.high:+.2f})"
    return Criterion("resident memory", words, "zero within, or negative", slope.low <= 0)


def judge(measured: Measured) -> list[Criterion]:
    """Every criterion but memory's, whose interval takes many samples."""
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
        _same("threads", measured.end.threads, measured.warm.threads),
        _same("open files", measured.end.files, measured.warm.files),
        Criterion(
            "no error logged, clean exit",
            f"{len(errors)} errors, exit {measured.exit_status}",
            "0, exit 0",
            not errors and measured.exit_status == 0,
        ),
    ]


def _same(name: str, now: int, before: int) -> Criterion:
    return Criterion(f"{name} as after the warm-up", str(now), str(before), now == before)


def _plain(slope: Slope) -> list[float]:
    return [significant(value) for value in (slope.value, slope.low, slope.high)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
