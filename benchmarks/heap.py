"""What a heap holds that nobody uses, after batches of many sizes: `python -m benchmarks.heap`.

The shipped checkpoint in fresh processes: malloc as it is by itself, and with large tensors mapped, as the engine sets
it (app/engine/allocator.py). Each process fills every slot with texts of the greatest length, encodes batches of each
third length from 1 to 1,024 tokens, and then decodes mixed texts (greedy, beams, samples, groups) that come by chance
but the same in both, for as many seconds as it is told. Needs glibc. Knows nothing of HTTP: see soak.py.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from app.engine import Engine, EngineConfig, GenerationParams, Sequence
from benchmarks import texts
from benchmarks.report import Report, cores

MAPPED, BY_ITSELF = "large tensors mapped", "malloc by itself"
KINDS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 1},
    {"num_beams": 1, "do_sample": True, "seed": 1, "top_k": 50},
    {"num_beams": 8, "num_return_sequences": 2},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0},
    {"num_beams": 4, "do_sample": True, "seed": 3},
]
LONGEST, STEPS, SLOTS = 512, 60, 16
MIB = 2**20


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def main() -> None:
    """Measure and print."""
    args = _arguments()
    if args.here is not None:
        # Not in the main thread, whose heap is another: the engine has a thread of its own.
        if args.way == BY_ITSELF:
            # glibc has read its environment; the engine reads it later, and leaves malloc alone.
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "malloc's own"
        thread = threading.Thread(target=measure_here, args=(args.here, args.seconds))
        thread.start()
        thread.join()
        return
    report = Report("The heap after batches of many sizes")
    model = texts.checkpoint(args.model)
    report.say(f"{model.parent.name} {model.name}, float32; {args.seconds:g} s of mixed texts.")
    found = {way: measure_apart(model, way, args.seconds) for way in (BY_ITSELF, MAPPED)}
    headers = ["", "in use, MiB", "unused, MiB", "resident, MiB", "after the texts: unused", "resident", "texts"]
    report.table(
        headers,
        [
            [
                *(way, *(f"{before[name]:.0f}" for name in ("used", "unused", "resident"))),
                *(*(f"{after[name]:.0f}" for name in ("unused", "resident")), after["texts"]),
            ]
            for way, (before, after) in found.items()
        ],
    )
    report.finish({"seconds": args.seconds, "ways": found}, args.output)


def measure_apart(model: Path, way: str, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """`measure_here` in a fresh process: before and after the mixed texts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    words = ["--here", str(model), "--way", way, "--seconds", str(seconds)]
    command = [sys.executable, "-m", "benchmarks.heap", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    before, after = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    return before, after


def measure_here(model: Path, seconds: float) -> None:
    """Print what the heap holds, as a line of JSON, before and after the mixed texts."""
    torch.set_num_threads(cores())
    generator = random.Random(0)
    engine = Engine.from_folder(model, EngineConfig(dtype="float32", max_num_seqs=SLOTS))

    def add(length: int, tokens: int, kind: dict[str, Any]) -> None:
        ids = tuple(generator.randint(1000, 29_000) for _ in range(length))
        engine.add(Sequence(ids, GenerationParams(max_new_tokens=tokens, min_new_tokens=tokens // 2, **kind)))

    for kind in KINDS:
        for _ in range(SLOTS):
            add(LONGEST, STEPS, kind)
        while engine.scheduler.has_work:
            engine.step()
    with torch.inference_mode():
        for count in range(1, 2 * LONGEST + 1, 3):
            lengths = [count] if count <= LONGEST else [LONGEST, count - LONGEST]
            for _ in engine.runner.checkpoint.model.encode(torch.full((count,), 2000), lengths):
                pass  # a layer's keys and values are made when they are asked for
    print(json.dumps(_heap()), flush=True)
    added, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        if len(engine.scheduler.waiting) < SLOTS and generator.random() < 0.25:
            for _ in range(generator.choice([1, 1, 1, 2, 4, 8])):
                add(generator.randint(20, LONGEST), generator.randint(5, 40), generator.choice(KINDS))
                added += 1
        if engine.scheduler.has_work:
            engine.step()
    print(json.dumps({**_heap(), "texts": added}), flush=True)


def _heap() -> dict[str, float]:
    """MiB of all heaps of this process."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    resident = psutil.Process().memory_info().rss
    return {"used": found.uordblks / MIB, "unused": found.fordblks / MIB, "resident": resident / MIB}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; default: the newest model of the store")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=[MAPPED, BY_ITSELF], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
