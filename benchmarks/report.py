"""What every benchmark says beside its figures: the machine, the versions, the commit, and who else was computing.

Prints tables in Markdown and a last line of JSON, and writes both to a file. Knows no benchmark and no model; needs
torch alone, so that it works on a machine without the service's libraries.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# What decides how fast 8- and 16-bit arithmetic is; a processor without them emulates it.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8")
LIBRARIES = ("torch", "transformers", "tokenizers", "ctranslate2", "openvino")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Spread:
    """A median and the range that it was taken from."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        held = list(values)
        return cls(statistics.median(held), min(held), max(held))

    def show(self, scale: float = 1.0, digits: int = 2) -> str:
        """`41.20 (40.10 to 42.30)`, each times `scale`."""
        median, low, high = (f"{scale * value:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"

    def plain(self) -> list[float]:
        """Median, lowest, highest, for JSON."""
        return [significant(value) for value in (self.median, self.low, self.high)]


class Report:
    """Collects what is printed, so that the same can be kept."""

    def __init__(self, title: str, device: str = "cpu") -> None:
        self.title = title
        self.machine = machine(device)
        self._began = _processor_seconds()
        self._kept: list[str] = []
        for line in describe(self.machine):
            print(line, flush=True)
        print()

    def say(self, text: str) -> None:
        """A line below the tables so far."""
        print(text + "\n", flush=True)
        self._kept.append(text)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A Markdown table that is also readable as it is."""
        self.say(format_table(headers, rows))

    def finish(self, results: dict[str, Any], output: Path | None) -> None:
        """Print how busy the machine was and the line of JSON, and write the file if one is asked for."""
        others, stolen = _others(self._began, _processor_seconds())
        self.machine["others_cpu_share"], self.machine["stolen_cpu_share"] = others, stolen
        self.say(
            f"While it ran, other processes took {100 * others:.0f} % of the cores, and the host {100 * stolen:.0f} %."
        )
        plain = json.dumps({"machine": self.machine, **results})
        print(plain, flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            parts = [f"# {self.title}", "\n".join(f"{line}  " for line in describe(self.machine)).rstrip(), *self._kept]
            output.write_text("\n\n".join([*parts, f"```json\n{plain}\n```"]) + "\n", encoding="utf-8")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, memory, accelerator, library versions, commit, command and load, as plain data."""
    facts: dict[str, Any] = {
        "command": _command(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "engine_sha256": _engine_hash(),
        "cpu": _cpu_name(),
        "cores": cores(),
        "flags": _flags(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        facts["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return facts


def describe(facts: dict[str, Any]) -> list[str]:
    """`machine` as a few lines."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"`{facts['command']}`, {facts['date']}, commit {facts['commit']}, engine {facts['engine_sha256'][:12]}",
        f"{facts['cores']} cores of {facts['cpu']} ({' '.join(facts['flags'])}), {facts['memory_gib']} GiB, "
        f"load average {facts['load_average']} at the start",
        versions,
    ]
    if "gpu" in facts:
        lines.insert(2, facts["gpu"])
    return lines


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown, columns padded to their widest cell; every column but the first is set to the right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    lines = [
        "| "
        + " | ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def significant(value: float, digits: int = 5) -> float:
    """Rounded to so many significant digits: JSON of figures, not of noise."""
    return float(f"{value:.{digits}g}")


def _command() -> str:
    main = sys.modules["__main__"]
    module = getattr(getattr(main, "__spec__", None), "name", None)
    start = f"python -m {module}" if module else f"python {sys.argv[0]}"
    return shlex.join([*start.split(), *sys.argv[1:]])


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--", "app", "train", "benchmarks")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes on top" if changed else commit


def _engine_hash() -> str:
    """Names the engine's code where it is not committed, or where there is no git."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "app" / "engine").rglob("*")):
        if file.suffix in (".py", ".c", ".h"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _cpu_lines(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key]


def _cpu_name() -> str:
    names, numbers = _cpu_lines("model name"), _cpu_lines("model")
    # Virtual machines hide the name; family and model still tell the generation.
    families = _cpu_lines("cpu family")
    if not names:
        return platform.processor() or platform.machine()
    return f"{names[0]} (family {families[0]}, model {numbers[0]})" if families and numbers else names[0]


def _flags() -> list[str]:
    found = set((_cpu_lines("flags") or [""])[0].split())
    return [flag for flag in FLAGS if flag in found]


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor_seconds() -> tuple[float, float, float, float]:
    """Since boot, over all cores: seconds busy, seconds stolen by the host; then this process's own; then the clock."""
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    except OSError:
        return 0.0, 0.0, mine, time.monotonic()
    user, nice, system, _, _, irq, softirq, steal = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8])
    return user + nice + system + irq + softirq, steal, mine, time.monotonic()


def _others(before: tuple[float, float, float, float], after: tuple[float, float, float, float]) -> tuple[float, float]:
    busy, stolen, mine, elapsed = (b - a for a, b in zip(before, after, strict=True))
    whole = max(elapsed, 1e-9) * (os.cpu_count() or 1)
    return round(max(0.0, busy - mine) / whole, 3), round(stolen / whole, 3)
