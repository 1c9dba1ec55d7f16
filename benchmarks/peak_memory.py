"""Peak memory of the engine or of `generate` on forced lengths, alone in a fresh process, as served.

The engine encodes by its own default budget, `generate` all at once. Peak of the run: VmHWM, reset after loading and a
warm-up of 8 tokens; on CUDA what torch's allocator held. Does not know what the two are compared for.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from app.engine import EngineConfig
from benchmarks.contenders import SIZES, Generate, Ours, forced, forced_config, random_sources


@dataclass(frozen=True)
class Work:
    """What one side does.

    Attributes:
        side: "ours" or "generate".
        max_output_tokens: the engine's own limit, by which its caches are laid out.
    """

    side: str
    folder: str
    dtype: str
    device: str
    size: str
    sequences: int
    threads: int
    max_output_tokens: int


def measure(work: Work) -> dict[str, int]:
    """`measure_here` in a fresh process.

    Raises:
        subprocess.CalledProcessError: it failed, or was killed for its memory.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", json.dumps(asdict(work))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_here(work: Work) -> dict[str, int]:
    """Bytes at the peak of one run of one side in this process, and over what stood once it was loaded and warm."""
    size, device = SIZES[work.size], work.device
    sources = random_sources(work.sequences, size)
    short = [sources[0][:8]]
    if work.side == "ours":
        config = EngineConfig(
            max_num_seqs=work.sequences,
            max_num_beams=4,
            max_output_tokens=work.max_output_tokens,
            device=device,
            dtype=work.dtype,
        )
        engine = Ours(Path(work.folder), work.dtype, device, size.new_tokens, config).engine
        engine.generate(short, forced(size.new_tokens))
        loading, loaded = _held(device)
        engine.generate(sources, forced(size.new_tokens))
    else:
        generate = Generate(Path(work.folder), work.dtype, device, forced_config(size.new_tokens))
        generate.generate(short)
        loading, loaded = _held(device)
        generate.generate(sources)
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")
    return {"peak": peak, "run": peak - loaded, "loading": loading, "loaded": loaded}


def _held(device: str) -> tuple[int, int]:
    """Peak so far and what is held now; forgets the peak."""
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return before
    before = _status("VmHWM"), _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=json.loads, help="the fields of Work, as JSON")
    asked = Work(**parser.parse_args().work)
    torch.set_num_threads(asked.threads)
    print(json.dumps(measure_here(asked)))
