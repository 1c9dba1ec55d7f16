"""How long from `python -m app` to ready, and where the time goes: `python -m benchmarks.startup [--runs N]`.

Starts the real server on a free port with the checkpoint that PRECIS_MODEL or the store names. The first run may read
files from disk: it is printed and left out of the median.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time


def seconds_to_ready() -> float:
    """From the start of the process to the line that it prints when it is ready."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "app"],
        env={**os.environ, "PRECIS_PORT": "0", "PRECIS_LOG_LEVEL": "warning"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        ready = any(line.startswith("Precis serves") for line in process.stdout)
        elapsed = time.perf_counter() - started
        process.send_signal(signal.SIGTERM)
        process.stdout.read()  # to the end: a pipe closed under the server would be an error there
        if not ready:
            raise SystemExit(f"the server did not start (exit status {process.wait()})")
    return elapsed


def seconds_to_import(module: str) -> float:
    """A fresh interpreter that imports one module and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    first, *ready = [seconds_to_ready() for _ in range(runs + 1)]
    imports = {
        module: statistics.median(seconds_to_import(module) for _ in range(3)) for module in ("torch", "app.main")
    }
    result = {
        "first_seconds": round(first, 2),
        "ready_seconds_median": round(statistics.median(ready), 2),
        "ready_seconds_max": round(max(ready), 2),
        "import_torch_seconds": round(imports["torch"], 2),
        "import_app_seconds": round(imports["app.main"], 2),
        "runs": runs,
        "cpus": len(os.sched_getaffinity(0)),
    }
    for name, value in result.items():
        print(f"{name:<24}{value:>8}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
