"""How long callers wait behind 1 to 1,000 replicas, from what one replica was measured to do.

`python -m benchmarks.simulate --measured benchmarks/results/DATE-ray-serve.md` reads what `benchmarks.ray_serve` kept:
what each text takes alone, how much faster texts are together, and the latencies of two real replicas. It then

1. predicts those latencies, with the same arrivals and texts, and ends with 1 unless every p50, p95 and p99 is within
   `--tolerance` of the real one. Two replicas shared two cores with callers, proxy and Ray, and the memory's bandwidth:
   what that costs is taken from the closed loops, never from the latencies that are predicted;
2. predicts 1 to 1,000 replicas, each with a core of its own, by ways of routing, for requests of one text and a mix;
3. lets the load rise and fall in front of the autoscaler.

What it leaves out: the network, proxies as a bottleneck (docs/scaling.md has that arithmetic), requests that are
refused, replicas that fail, texts whose cost depends on who is beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.settings import Settings
from benchmarks.criteria import Criterion, show
from benchmarks.queueing import (
    Autoscaling,
    RandomRouter,
    Request,
    RequestsRouter,
    Router,
    ServeRouter,
    Speed,
    TokensRouter,
    interpolated,
    simulate,
)
from benchmarks.report import Report, significant

SLOTS = int(Settings.model_fields["max_num_seqs"].default)
REPLICAS = (1, 2, 4, 10, 30, 100, 300, 1000)
UTILISATIONS = (0.5, 0.8)
REPLICAS_A_PROXY = 10
LEAST_REQUESTS = 6000
REQUESTS_A_REPLICA = 40
LEFT_OUT = 0.2
FLEETS = (10, 30)  # of the autoscaler's hour
# Texts in a request, and how often: a guess at a service that people and batch jobs share.
MIX = {1: 0.85, 4: 0.1, 32: 0.05}
TOLERANCE = 0.25


@dataclass(frozen=True)
class Measured:
    """What one real run says.

    Attributes:
        works: seconds alone in the engine, of each text.
        tokens: what a router takes each text for.
        speeds: texts in one engine -> its speed; 1 is one text's alone.
        overhead: seconds between engine and caller.
        shares: texts in each of two engines -> speed of each, where 1 is that of one with so many texts and nobody
            beside it.
        rate: answers a second of one replica, full.
    """

    works: list[float]
    tokens: list[float]
    speeds: dict[int, float]
    overhead: float
    shares: dict[int, float]
    rate: float
    opened: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def speed(self) -> Speed:
        """For any number of texts."""
        return interpolated(self.speeds)

    @property
    def full_rate(self) -> float:
        """Texts a second of one replica with every slot taken, by the model."""
        return self.speed(SLOTS) / float(np.mean(self.works))


def read(file: Path) -> Measured:
    """What `benchmarks.ray_serve` wrote.

    Raises:
        ValueError: the file holds no result.
    """
    found = re.search(r"```json\n(.*?)\n```", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    if found is None:
        raise ValueError(f"{file} holds no result of benchmarks.ray_serve")
    results = json.loads(found[1])
    works = [text["engine_s"] for text in results["alone"]]
    one, two = (
        {run["callers"]: run["answers_per_second"] for run in results["closed"] if run["replicas"] == replicas}
        for replicas in (1, 2)
    )
    mean = float(np.mean(works))
    # Of so many callers some are on their way, so that fewer texts are in the engine: their number is what Little's law
    # makes of the rate and the time in the engine. Callers beyond the slots fill them.
    overhead = float(np.mean([text["caller_s"] - text["engine_s"] for text in results["alone"]]))
    speeds, shares = {1: 1.0}, dict[int, float]()
    for callers, rate in sorted(one.items()):
        inside = min(SLOTS, max(1, round(callers - rate * overhead)))
        speeds[inside] = max(speeds.get(inside, 0.0), rate * mean) if inside > 1 else 1.0
        if 2 * callers in two:
            shares[inside] = two[2 * callers] / (2 * rate)
    return Measured(
        works,
        [float(length) for length in results["bytes"]],
        speeds,
        overhead,
        shares,
        max(one.values()),
        results["open"],
        results,
    )


def main() -> int:
    """Predict and print; 1 if the real run is not met."""
    args = _arguments()
    measured = read(args.measured)
    report = Report("Replicas, simulated from one that was measured")
    report.say(
        f"From `{args.measured}`: {1e3 * np.mean(measured.works):.0f} ms a text alone, "
        + ", ".join(f"{speed:.2f} times as fast with {n}" for n, speed in sorted(measured.speeds.items()) if n > 1)
        + f"; {1e3 * measured.overhead:.0f} ms outside the engine. Of two replicas on two cores each is "
        + ", ".join(
            f"{share:.2f} times as fast as one by itself with {n}" for n, share in sorted(measured.shares.items())
        )
        + "."
    )
    rows = [check(measured, run) for run in measured.opened]
    report.say("Two replicas: real and simulated.")
    report.table(
        ["share", "arrivals/s", *(f"{q} s {kind}" for q in ("p50", "p95", "p99") for kind in ("real", "model"))],
        [
            [f"{row['share']:g}", f"{row['rate']:.2f}", *(f"{v:.2f}" for pair in row["pairs"] for v in pair)]
            for row in rows
        ],
    )
    worst = max(abs(model / real - 1) for row in rows for real, model in row["pairs"])
    scaled = scale(report, measured, args.replicas, args.seed)
    scaling = autoscale(report, measured, args.seed)
    criteria = [
        Criterion(
            "model against the real run, farthest quantile",
            f"{worst:.0%}",
            f"within {args.tolerance:.0%}",
            worst <= args.tolerance,
        )
    ]
    show(report, criteria)
    results = {"measured": str(args.measured), "check": rows, "scale": scaled, "autoscaling": scaling}
    report.finish({**results, "criteria": [criterion.plain() for criterion in criteria]}, args.output)
    return 0 if all(criterion.met for criterion in criteria) else 1


def check(measured: Measured, run: dict[str, Any]) -> dict[str, Any]:
    """One open loop again, with its own arrivals and texts."""
    count = len(measured.works)
    requests = [
        Request(due, [measured.works[index % count]], measured.tokens[index % count])
        for index, due in enumerate(run["dues_s"])
    ]
    share = interpolated(measured.shares)

    def contention(running: Sequence[int]) -> float:
        return 1.0 if 0 in running else share(round(float(np.mean(running))))

    router = TokensRouter(np.random.default_rng(0))
    outcome = simulate(requests, 2, SLOTS, measured.speed, router, contention)
    pairs = zip(run["latency_s_p50_p95_p99"], _quantiles(outcome.latencies(), measured), strict=True)
    return {
        "share": run["share"],
        "rate": run["rate"],
        "pairs": [(real, significant(model, 4)) for real, model in pairs],
    }


def scale(report: Report, measured: Measured, sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """1 to 1,000 replicas, by ways of routing."""
    found = []
    for mix, name in (({1: 1.0}, "one text a request"), (MIX, "a mix of 1, 4 and 32 texts a request")):
        for utilisation in UTILISATIONS:
            report.say(f"{name.capitalize()}, {utilisation:.0%} of what the replicas can do.")
            rows = []
            for size in sizes:
                row: dict[str, Any] = {"mix": name, "utilisation": utilisation, "replicas": size}
                for kind, router in _routers(size, seed).items():
                    requests = _poisson(measured, size * utilisation * measured.full_rate, size, mix, seed)
                    outcome = simulate(requests, size, SLOTS, measured.speed, router)
                    since = LEFT_OUT * requests[-1].at
                    row[kind] = _quantiles(outcome.latencies(since, (1 - LEFT_OUT) * requests[-1].at), measured)
                found.append({key: _plain(value) for key, value in row.items()})
                rows.append([size, *(f"{v:.2f}" for kind in _routers(1, 0) for v in row[kind])])
            headers = [f"{kind} {q}" for kind in _routers(1, 0) for q in ("p50", "p95", "p99")]
            report.table(["replicas", *headers], rows)
    return found


def _routers(size: int, seed: int) -> dict[str, Router]:
    """Chance, what Serve comes with, and deploy/ray/routing.py."""
    chance, serve, ours = (np.random.default_rng([seed, stream]) for stream in range(3))
    proxies = max(1, size // REPLICAS_A_PROXY)
    return {
        "chance": RandomRouter(chance),
        "Serve's": ServeRouter(serve, proxies),
        "ours": TokensRouter(ours, proxies),
    }


def autoscale(report: Report, measured: Measured, seed: int) -> list[dict[str, Any]]:
    """An hour: a tenth of the load, ten times that for twenty minutes, and back."""
    found = []
    for most in FLEETS:
        busy = 0.7 * most * measured.full_rate
        stretches = [(0.0, 1200.0, busy / 10), (1200.0, 2400.0, busy), (2400.0, 3600.0, busy / 10)]
        requests: list[Request] = []
        for number, (begins, ends, rate) in enumerate(stretches):
            count = int(rate * (ends - begins))
            ats = np.sort(np.random.default_rng([seed, number]).uniform(begins, ends, count)).tolist()
            requests += _requests(measured, ats, {1: 1.0}, seed + number)
        least = max(1, most // 10)
        plans = {
            "fixed": None,
            "autoscaled": Autoscaling(least, 2 * most, float(SLOTS)),
            "quickly": Autoscaling(least, 2 * most, float(SLOTS), look_back=4.0, interval=1.0, upscale_delay=2.0),
            "quickly, from half": Autoscaling(most // 2, 2 * most, SLOTS / 2, 4.0, 1.0, upscale_delay=2.0),
        }
        for kind, plan in plans.items():
            again = [Request(r.at, r.works, r.tokens) for r in requests]
            router = RequestsRouter(np.random.default_rng(seed))
            start = plan.least if plan else most
            outcome = simulate(again, start, SLOTS, measured.speed, router, autoscaling=plan)
            found.append(
                {
                    "kind": kind,
                    "least": start,
                    "most": max(size for _, size in outcome.sizes),
                    "replica_hours": significant(outcome.replica_seconds() / 3600, 4),
                    "first_minutes_s": _plain(_quantiles(outcome.latencies(1200, 1320), measured)),
                    "busy_s": _plain(_quantiles(outcome.latencies(1320, 2400), measured)),
                    "quiet_s": _plain(_quantiles(outcome.latencies(2400), measured)),
                }
            )
    report.say(
        f"Twenty minutes at a tenth of the load, twenty at 70 % of what {FLEETS[0]} (then {FLEETS[1]}) replicas do, "
        "twenty at a tenth again; ten seconds from a replica's order to its first request. p50, p95, p99 in seconds. "
        f"Autoscaled: {SLOTS} texts a replica wanted, mean over 10 s, up after 10 s; quickly: over 4 s, up after 2 s; "
        f"from half: never fewer than half, and {SLOTS // 2} texts a replica wanted."
    )
    report.table(
        ["", "replicas", "replica hours", "first two minutes of the rush", "after them", "when it is over"],
        [
            [
                *(row["kind"], f"{row['least']} to {row['most']}", row["replica_hours"]),
                *(", ".join(f"{v:.2f}" for v in row[name]) for name in ("first_minutes_s", "busy_s", "quiet_s")),
            ]
            for row in found
        ],
    )
    return found


def _poisson(measured: Measured, texts_a_second: float, size: int, mix: dict[int, float], seed: int) -> list[Request]:
    count = max(LEAST_REQUESTS, REQUESTS_A_REPLICA * size)
    rate = texts_a_second / sum(texts * share for texts, share in mix.items())
    ats = np.cumsum(np.random.default_rng([seed, size]).exponential(1 / rate, count)).tolist()
    return _requests(measured, ats, mix, seed)


def _requests(measured: Measured, ats: Sequence[float], mix: dict[int, float], seed: int) -> list[Request]:
    generator = np.random.default_rng([seed, len(ats)])
    sizes = generator.choice(list(mix), len(ats), p=list(mix.values())).tolist()
    chosen = iter(generator.integers(0, len(measured.works), sum(sizes)).tolist())
    requests = []
    for at, texts in zip(ats, sizes, strict=True):
        which = [next(chosen) for _ in range(texts)]
        works, tokens = [measured.works[i] for i in which], sum(measured.tokens[i] for i in which)
        requests.append(Request(at, works, tokens))
    return requests


def _quantiles(latencies: Sequence[float], measured: Measured) -> list[float]:
    """p50, p95, p99, as a caller sees them."""
    return [float(value) + measured.overhead for value in np.quantile(latencies, [0.5, 0.95, 0.99])]


def _plain(value: Any) -> Any:
    return [significant(v, 4) for v in value] if isinstance(value, list) else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="what benchmarks.ray_serve kept")
    parser.add_argument("--replicas", type=int, nargs="+", default=list(REPLICAS))
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the model against the real run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
