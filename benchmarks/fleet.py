"""What N replicas do and need, by multiplication: `python -m benchmarks.fleet --measured RESULT`.

RESULT is what `benchmarks.ray_serve` kept. Everything but the first column of the table is arithmetic: nothing here
knows what N replicas do to one another. `benchmarks.simulate` has the waiting, and docs/scaling.md says which of these
rows breaks first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from app.model_registry import SERVED_FILES, find_model
from app.settings import Settings
from benchmarks.report import format_table
from benchmarks.simulate import SLOTS, read

SIZES = (1, 10, 100, 1000)
# Calls of Serve's controller a second for each replica, as deploy/ray/application.py has them by default: reports to
# the routers, to the autoscaler, and health checks.
PERIODS = {"routing": 1.0, "autoscaling": 2.0, "health": 5.0}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="what benchmarks.ray_serve kept")
    parser.add_argument("--utilisation", type=float, default=0.7)
    args = parser.parse_args()
    measured = read(args.measured)
    full = max(
        (run for run in measured.results["closed"] if run["replicas"] == 1), key=lambda run: run["answers_per_second"]
    )
    tokens = float(np.mean([text["source_tokens"] for text in measured.results["alone"]]))
    folder = find_model(None, Path("model_store")).folder
    weights = sum(file.stat().st_size for pattern in SERVED_FILES for file in folder.glob(pattern)) / 1e6
    proxy = full["cores"]["proxy"] / full["answers_per_second"]
    rate = args.utilisation * measured.rate
    queue = int(Settings.model_fields["max_queue_tokens"].default)
    calls = sum(1 / period for period in PERIODS.values())
    rows = [
        [f"answers a second at {args.utilisation:.0%}", *(f"{size * rate:,.1f}" for size in SIZES)],
        ["source tokens a second", *(f"{size * rate * tokens:,.0f}" for size in SIZES)],
        ["hours for a million summaries", *(f"{1e6 / (size * rate) / 3600:,.2f}" for size in SIZES)],
        ["texts decoded together", *(f"{size * SLOTS:,}" for size in SIZES)],
        ["source tokens admitted before 429", *(f"{size * queue:,}" for size in SIZES)],
        ["the wait that this is, s", *(f"{queue / (measured.rate * tokens):,.0f}" for _ in SIZES)],
        ["GiB of replicas' own memory", *(f"{size * max(full['memory_mib']) / 1024:,.1f}" for size in SIZES)],
        ["GB of weights to read at a start", *(f"{size * weights / 1e3:,.1f}" for size in SIZES)],
        ["cores of Serve's proxies", *(f"{size * rate * proxy:,.2f}" for size in SIZES)],
        ["calls of Serve's controller a second", *(f"{size * calls:,.1f}" for size in SIZES)],
    ]
    print(f"{measured.rate:.2f} answers a second of one replica, {1e3 * proxy:.1f} ms of a proxy's core an answer.\n")
    print(format_table(["replicas", *(f"{size:,}" for size in SIZES)], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
