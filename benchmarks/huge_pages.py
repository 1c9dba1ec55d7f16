"""What pages of 2 MiB are worth to a decode step: `python -m benchmarks.huge_pages`.

The work of `benchmarks.engine`, in fresh processes that take turns: with THP_MEM_ALLOC_ENABLE=1, as the engine sets it,
and with 0. Linux only; /sys/kernel/mm/transparent_hugepage/enabled must say `madvise` or `always`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from app.engine import EngineConfig
from benchmarks.contenders import SIZES, Ours, random_sources, write_checkpoint
from benchmarks.report import Report, Spread, cores, significant

VARIABLE = "THP_MEM_ALLOC_ENABLE"


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.folder:
        print(json.dumps(measure_here(args.folder, args.size, args.dtypes[0], args.sequences)))
        return
    report = Report("Pages of 2 MiB against pages of 4 KiB")
    system = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    report.say(f"{system}: {system.read_text(encoding='ascii').strip() if system.exists() else 'is not there'}")
    found = []
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), SIZES[args.size])
        for dtype in args.dtypes:
            runs: dict[str, list[dict[str, list[float]]]] = {"1": [], "0": []}
            for _ in range(args.rounds):
                for value, held in runs.items():
                    held.append(measure_apart(args, name, dtype, value))
            for count in map(str, args.sequences):
                for part, index in (("step", 0), ("encode", 1)):
                    with_, without = ([run[count][index] for run in runs[value]] for value in ("1", "0"))
                    gain = Spread.of(b / a for a, b in zip(with_, without, strict=True))
                    row = {"dtype": dtype, "sequences": int(count), "part": part}
                    times = {"with": Spread.of(with_).plain(), "without": Spread.of(without).plain()}
                    found.append({**row, **times, "ratio": gain.plain()})
    headers = ["dtype", "seqs", "part", "ms, 2 MiB", "ms, 4 KiB", "ratio"]
    report.table(
        headers,
        [
            [r["dtype"], r["sequences"], r["part"], *(Spread(*r[name]).show() for name in ("with", "without", "ratio"))]
            for r in found
        ],
    )
    report.finish({"threads": args.threads, "rounds": args.rounds, "rows": found}, args.output)


def measure_apart(args: argparse.Namespace, folder: str, dtype: str, value: str) -> dict[str, list[float]]:
    """`measure_here` in a fresh process."""
    words = ["--folder", folder, "--dtypes", dtype, "--size", args.size, "--threads", str(args.threads)]
    command = [sys.executable, "-m", "benchmarks.huge_pages", *words, "--sequences", *map(str, args.sequences)]
    environment = {**os.environ, VARIABLE: value}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_here(folder: Path, size: str, dtype: str, counts: list[int]) -> dict[str, list[float]]:
    """By number of sequences: milliseconds of a step, and of encoding them all. The second run counts."""
    found = {}
    for count in counts:
        work = SIZES[size]
        config = EngineConfig(
            max_num_seqs=count,
            max_num_beams=4,
            max_encode_tokens=count * work.source_tokens,
            max_output_tokens=work.new_tokens,
            dtype=dtype,
        )
        ours = Ours(folder, dtype, "cpu", work.new_tokens, config)
        sources = random_sources(count, work)
        ours.run(sources)
        timing = ours.run(sources)
        found[str(count)] = [significant(1e3 * s) for s in (timing.steps / (work.new_tokens - 1), timing.encode)]
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
