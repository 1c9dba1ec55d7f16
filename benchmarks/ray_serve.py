"""One Ray Serve replica against two: `python -m benchmarks.ray_serve --output benchmarks/results/DATE-ray-serve.md`.

Two Ray nodes on this machine, one core and one torch thread a replica (`make test-ray` installs Ray). In turn:

alone    one request at a time on one replica: each text's service time, which is what `benchmarks.simulate` works from
closed   so many callers, each with one request at a time: throughput by the texts that run in a replica, of one and of
         two, and the memory of each process
open     Poisson arrivals at shares of the two replicas' capacity: the latencies that the simulation is held against

Callers, proxy and Ray's own processes share the two cores with the replicas, so two replicas have less than a core
each: the table has every process's share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from app.model_registry import find_model
from benchmarks.criteria import Criterion, show
from benchmarks.ray_cluster import Answer, Load, ServeCluster, ask, client, serve_cluster
from benchmarks.report import Report, significant
from benchmarks.traffic import conversations

TEXTS = 57  # three of each length
CONCURRENCY = (1, 2, 4, 8, 16, 32)  # callers a replica; the last is twice the slots
SHARES = (0.3, 0.5, 0.7)
LEFT_OUT = 0.2
LEAST_FACTOR = 1.5


@dataclass
class Closed:
    """What a closed loop came to, in its steady part.

    Attributes:
        cpu: seconds of processor time a second, as `ServeCluster.processor_seconds` divides them.
    """

    replicas: int
    callers: int
    seconds: float
    answers: list[Answer]
    cpu: dict[str, float]
    memory_mib: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.answers) / self.seconds


def main() -> int:
    """Measure and print; 1 if a criterion is not met."""
    args = _arguments()
    report = Report("Ray Serve, one replica and two")
    report.machine["versions"]["ray"] = version("ray")
    texts = conversations(TEXTS, args.seed)
    bodies = [json.dumps({"inputs": text}).encode() for text in texts]
    with serve_cluster(1) as cluster:
        _deploy(cluster, 1)
        alone = asyncio.run(_alone(cluster, bodies, args.rounds))
        closed = [asyncio.run(_closed(cluster, bodies, 1, callers, args.seconds)) for callers in CONCURRENCY]
        cluster.add_node(1)
        _deploy(cluster, 2)
        closed += [asyncio.run(_closed(cluster, bodies, 2, 2 * callers, args.seconds)) for callers in CONCURRENCY]
        opened = [
            asyncio.run(_open(cluster, bodies, share, share * closed[-1].rate, args.open_seconds, args.seed))
            for share in args.shares
        ]
    one, two = closed[len(CONCURRENCY) - 1], closed[-1]
    _say(report, alone, closed, opened)
    factor = two.rate / one.rate
    statuses = {answer.status for run in [*closed] for answer in run.answers}
    statuses |= {answer.status for run in opened for answer in run["answers"]}
    criteria = [
        Criterion("nothing but 200", str(sorted(statuses)), "[200]", statuses == {200}),
        Criterion("two replicas against one", f"{factor:.2f}", f"at least {LEAST_FACTOR:g}", factor >= LEAST_FACTOR),
    ]
    show(report, criteria)
    report.finish(_plain(args, texts, alone, closed, opened, factor, criteria), args.output)
    return 0 if all(criterion.met for criterion in criteria) else 1


def _deploy(cluster: ServeCluster, replicas: int) -> None:
    from deploy.ray.application import Arguments, build

    settings = {"dtype": "float32", "log_level": "warning", "max_queue_requests": 1000}
    model = str(find_model(None, Path("model_store")).folder)
    arguments = Arguments(model=model, settings=settings, min_replicas=replicas, max_replicas=replicas)
    cluster.deploy(build(arguments), replicas)


async def _alone(cluster: ServeCluster, bodies: Sequence[bytes], rounds: int) -> list[dict[str, float]]:
    """Each text by itself: seconds in the engine, as the server says, and seconds as its caller sees them."""
    held: list[list[tuple[float, float]]] = [[] for _ in bodies]
    tokens: list[tuple[int, int]] = []
    async with client(cluster.url) as http:
        for round_ in range(rounds + 1):
            for index, body in enumerate(bodies):
                sent = time.perf_counter()
                reply = await http.post("/summarize", content=body, headers={"content-type": "application/json"})
                seconds = time.perf_counter() - sent
                (item,) = reply.raise_for_status().json()
                if round_ == 0:  # warm-up
                    tokens.append((item["source_tokens"], item["output_tokens"]))
                else:
                    held[index].append((float(reply.headers["x-inference-time"]) / 1e3, seconds))
    medians = [np.median(np.array(pairs), axis=0) for pairs in held]
    return [
        {"engine_s": float(engine), "caller_s": float(caller), "source_tokens": source, "output_tokens": output}
        for (engine, caller), (source, output) in zip(medians, tokens, strict=True)
    ]


async def _closed(
    cluster: ServeCluster, bodies: Sequence[bytes], replicas: int, callers: int, seconds: float
) -> Closed:
    load, stop = Load(cluster.url, bodies), asyncio.Event()
    running = asyncio.create_task(load.run(callers, stop))
    await asyncio.sleep(LEFT_OUT * seconds)
    began, before = time.perf_counter(), cluster.processor_seconds()
    await asyncio.sleep((1 - LEFT_OUT) * seconds)
    ended, after = time.perf_counter(), cluster.processor_seconds()
    memory = [psutil.Process(pid).memory_full_info().uss / 2**20 for pid in cluster.replica_pids()]
    stop.set()
    await running
    steady = [answer for answer in load.answers if began <= answer.done < ended]
    cpu = {name: (after[name] - before[name]) / (ended - began) for name in after}
    found = Closed(replicas, callers, ended - began, steady, cpu, memory)
    print(f"{replicas} replicas, {callers} callers: {found.rate:.2f} answers/s", file=sys.stderr, flush=True)
    return found


async def _open(
    cluster: ServeCluster, bodies: Sequence[bytes], share: float, rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Arrivals at their own times; latency counts from when one was due."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(2 * rate * seconds) + 20)
    dues = [float(due) for due in np.cumsum(gaps) if due < seconds]
    answers: list[Answer] = []
    latencies = [0.0] * len(dues)
    before = cluster.processor_seconds()
    async with client(cluster.url) as http:
        began = time.perf_counter()

        async def arrive(index: int, due: float) -> None:
            answer = await ask(http, bodies[index % len(bodies)])
            answers.append(answer)
            latencies[index] = answer.done - (began + due)

        async with asyncio.TaskGroup() as group:
            for index, due in enumerate(dues):
                await asyncio.sleep(began + due - time.perf_counter())
                group.create_task(arrive(index, due))
    print(f"share {share:g}, {rate:.2f}/s: p95 {np.quantile(latencies, 0.95):.2f} s", file=sys.stderr, flush=True)
    after, elapsed = cluster.processor_seconds(), time.perf_counter() - began
    cpu = {name: (after[name] - before[name]) / elapsed for name in after}
    return {"share": share, "rate": rate, "dues": dues, "answers": answers, "latencies": latencies, "cpu": cpu}


def quantiles(seconds: Sequence[float]) -> list[float]:
    """p50, p95, p99."""
    return [float(value) for value in np.quantile(seconds, [0.5, 0.95, 0.99])]


def _say(report: Report, alone: list[dict[str, float]], closed: list[Closed], opened: list[dict[str, Any]]) -> None:
    source, output, engine, caller = (
        float(np.mean([text[name] for text in alone]))
        for name in ("source_tokens", "output_tokens", "engine_s", "caller_s")
    )
    report.say(
        f"{len(alone)} conversations of 2 to 20 turns, {source:.0f} source and {output:.0f} output tokens in the mean, "
        f"the checkpoint's own options, float32. Alone: {1e3 * engine:.0f} ms in the engine, {1e3 * caller:.0f} ms as "
        f"the caller sees it."
    )
    names = list(closed[0].cpu)
    report.table(
        [
            "replicas",
            "callers",
            "answers/s",
            "source tokens/s",
            "p50 s",
            "p95 s",
            *(f"{n} cores" for n in names),
            "MiB",
        ],
        [
            [
                *(run.replicas, run.callers, f"{run.rate:.2f}", f"{run.rate * source:.0f}"),
                *(f"{value:.2f}" for value in quantiles([a.seconds for a in run.answers])[:2]),
                *(f"{run.cpu[name]:.2f}" for name in names),
                ", ".join(f"{mib:.0f}" for mib in run.memory_mib),
            ]
            for run in closed
        ],
    )
    report.say("Open loop on two replicas; shares of what two answered in the closed loop.")
    report.table(
        ["share", "arrivals/s", "requests", "p50 s", "p95 s", "p99 s", *(f"{name} cores" for name in names)],
        [
            [
                *(f"{run['share']:g}", f"{run['rate']:.2f}", len(run["latencies"])),
                *(f"{value:.2f}" for value in quantiles(run["latencies"])),
                *(f"{run['cpu'][name]:.2f}" for name in names),
            ]
            for run in opened
        ],
    )
    report.say(
        "Ray's processes are not this one's children: the line below counts them among others, the tables do not."
    )


def _plain(
    args: argparse.Namespace,
    texts: Sequence[str],
    alone: list[dict[str, float]],
    closed: list[Closed],
    opened: list[dict[str, Any]],
    factor: float,
    criteria: list[Criterion],
) -> dict[str, Any]:
    return {
        "seed": args.seed,
        "bytes": [len(text.encode()) for text in texts],
        "alone": [{name: significant(value, 4) for name, value in text.items()} for text in alone],
        "closed": [
            {
                "replicas": run.replicas,
                "callers": run.callers,
                "answers_per_second": significant(run.rate),
                "latency_s_p50_p95_p99": [significant(v, 4) for v in quantiles([a.seconds for a in run.answers])],
                "cores": {name: significant(value, 3) for name, value in run.cpu.items()},
                "memory_mib": [round(mib) for mib in run.memory_mib],
            }
            for run in closed
        ],
        "two_to_one": significant(factor, 4),
        "open": [
            {
                "share": run["share"],
                "rate": significant(run["rate"]),
                "dues_s": [round(due, 3) for due in run["dues"]],
                "latency_s_p50_p95_p99": [significant(value, 4) for value in quantiles(run["latencies"])],
                "latencies_s": [round(seconds, 3) for seconds in run["latencies"]],
                "cores": {name: significant(value, 3) for name, value in run["cpu"].items()},
            }
            for run in opened
        ],
        "criteria": [criterion.plain() for criterion in criteria],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of each text alone")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each closed loop")
    parser.add_argument("--open-seconds", type=float, default=60.0, help="of each open loop")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the capacity of two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
