"""How much faster than `generate` the engine decodes, and how near the hardware: `python -m benchmarks.engine`.

Random bert-base2bert-base weights (12 + 12 layers, 768 wide, 30,522 tokens), sources of 512 tokens, 48 forced tokens,
4 beams, `no_repeat_ngram_size` 3. They are saved in fp32, or (`--saved float16`) in fp16, as `train export` saves them:
both sides then compute with the numbers that the file holds. Both load the same files (on a CPU `generate` in a process
of its own, because the engine's malloc would slow it down: benchmarks/apart.py) and run with the
same threads, in turn (the order changes every round) after one full run each. Figures are medians over the rounds, with
the range.

How each side is timed (benchmarks/contenders.py does it):
- `generate`: its encoder is called by itself (`encode`), then `generate(encoder_outputs=...)`, which only decodes
  (`decode`). In its first step it also computes its cross-attention keys and values, for every beam; the engine does
  that once a sequence while it encodes. So the main ratio is over the last 47 steps of both (`step`), where nothing is
  encoded on either side; the ratio of whole decode loops, generate's cross keys and values included, stands beside it.
- The engine: `step()` by hand, all admitted in the first step. `encode` is that step less the mean of the others.
- End to end is encode + decode.
- CTranslate2 (`--peer ctranslate2`): a random BART of the same dimensions, int8, the same threads, sources and lengths,
  in a process of its own (benchmarks/peer.py), because beside it in ours both would be slower. Its step is (a call for
  48 tokens - a call for 1 token) / 47. A BART is not a BERT: the same matrices, other norms.

A step is held against its floor (benchmarks/floor.py): the bytes that it must read, over the bandwidth measured here.
A processor whose last cache holds the weights can go below it: the bandwidth of 256 MiB read again is printed, too.
With many rows it is arithmetic that bounds a step: its multiplications at the rate of one large product, measured here
in the same dtype, stand beside it.

Memory: each side alone in a fresh process, as served (benchmarks/peak_memory.py); in all, and over what stood after
loading.

Measures, and leaves medians, ratios and tables to benchmarks/engine_tables.py. Knows nothing of texts, natural lengths
or HTTP: benchmarks/shipped.py and benchmarks/serving.py do.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from app.engine import EngineConfig
from benchmarks import engine_tables, peak_memory
from benchmarks.apart import GenerateApart
from benchmarks.contenders import (
    BEAMS,
    SIZES,
    Contender,
    Generate,
    Ours,
    Size,
    Timing,
    forced_config,
    random_sources,
    write_checkpoint,
)
from benchmarks.floor import WEIGHT_BYTES, Floor, decoder_weights, step_bytes, step_multiplications
from benchmarks.hardware import measure_bandwidth, measure_rate, rows_in
from benchmarks.peer import Peer, write_bart
from benchmarks.report import Report, Spread, cores

PAUSE = 0.3  # seconds between two runs: threads of the last one stop spinning


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    report = Report(f"The engine against `generate` on {args.device}", args.device)
    results: dict[str, Any] = {"size": args.size, "saved": args.saved, "threads": args.threads, "rounds": args.rounds}
    results["bandwidth"] = bandwidth = measure_bandwidth(args.device, args.bandwidth_gib)
    report.say(
        f"Threads: {args.threads}. Weights saved in {args.saved}. "
        f"Bandwidth in GB/s: {bandwidth['read'] / 1e9:.1f} reading, "
        f"{bandwidth['copy'] / 1e9:.1f} copying (both ways counted), "
        f"{bandwidth['cached'] / 1e9:.1f} reading 256 MiB again."
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", size, dtype=getattr(torch, args.saved))
        if args.peer:
            write_bart(folder, size)
        bench = Bench(args, size, folder, report, bandwidth["read"])
        results["rows"], results["failed"] = bench.rows()
        results["best_batch"] = bench.best_batches
        if results["rows"]:
            engine_tables.print_speed(report, results["rows"], size, args.rounds)
            engine_tables.print_floor(report, results["rows"], size)
            engine_tables.print_others(report, results["rows"], "compared", f"ours in {bench.sixteen_or_full}")
            engine_tables.print_others(report, results["rows"], "peer", f"CTranslate2 {args.peer_compute}")
            engine_tables.print_best_batches(report, bench.best_batches)
        if not args.no_memory:
            results["memory"] = bench.memory([dtype for dtype in args.dtypes if dtype not in results["failed"]])
            engine_tables.print_memory(report, results["memory"])
    report.finish(results, args.output)


class Bench:
    """The rounds: which contenders meet, at which work, on a machine of which bandwidth."""

    def __init__(self, args: argparse.Namespace, size: Size, folder: Path, report: Report, bandwidth: float) -> None:
        self.args, self.size, self.folder, self.report, self.bandwidth = args, size, folder, report, bandwidth
        self.model = folder / "model"
        self.weights = decoder_weights(self.model)
        self.best_batches: list[dict[str, Any]] = []
        self.rates: dict[str, float] = {}
        # What int8 is compared with.
        self.sixteen_or_full = next((d for d in args.dtypes if d in ("bfloat16", "float16")), "float32")

    def rows(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """All rows, and why a dtype has none: an hour's figures are not lost with the last of them."""
        rows: list[dict[str, Any]] = []
        failed = {}
        for dtype in self.args.dtypes:
            try:
                rows += self.rows_of(dtype)
            except Exception as error:
                failed[dtype] = f"{type(error).__name__}: {error}"
                self.report.say(f"No figures for {dtype}: {failed[dtype]}")
            _collect(self.args.device)
        return rows, failed

    def rows_of(self, dtype: str) -> list[dict[str, Any]]:
        """One row for every number of sequences."""
        with ExitStack() as stack:
            return self.rows_with(dtype, self.contenders(dtype, stack))

    def contenders(self, dtype: str, stack: ExitStack) -> dict[str, Contender]:
        """Who meets in a dtype; `stack` ends the peer's process."""
        args, reference = self.args, _generate_dtype(dtype)
        contenders: dict[str, Contender] = {"ours": self.ours(dtype)}
        if dtype == "int8":
            contenders["compared"] = self.ours(self.sixteen_or_full)
        of_generate = (self.model, reference, args.device, forced_config(self.size.new_tokens))
        if args.device == "cpu":
            apart = stack.enter_context(closing(GenerateApart(*of_generate)))
            contenders["generate"] = apart
        else:
            contenders["generate"] = Generate(*of_generate)
        if args.peer:
            peer = Peer(self.folder / "converted", args.peer_compute, args.device, self.size.new_tokens, args.threads)
            contenders["peer"] = stack.enter_context(peer)
        return contenders

    def rows_with(self, dtype: str, contenders: dict[str, Contender]) -> list[dict[str, Any]]:
        """Each number of sequences, one after the other."""
        rows = []
        for count in self.args.sequences:
            sources = random_sources(count, self.size)
            timings = in_turn(contenders, sources, self.args.rounds)
            rows.append(self.row(dtype, count, timings))
            steps = ", ".join(f"{name} {values[0]:.2f} ms" for name, values in rows[-1]["step_ms"].items())
            _progress(f"{dtype}, {count} sequences, a step: {steps}")
            ours = contenders["ours"]
            if self.args.profile and isinstance(ours, Ours):
                write_profile(ours, sources, dtype, self.args.device, self.args.profile)
        generate = contenders["generate"]
        if self.args.best_batch and isinstance(generate, (Generate, GenerateApart)):
            self.best_batches.append(self.best_batch(dtype, generate, rows))
        return rows

    def ours(self, dtype: str) -> Ours:
        """An engine whose slots and encode budget take all sequences at once."""
        slots = max(self.args.sequences)
        config = EngineConfig(
            max_num_seqs=slots,
            max_num_beams=BEAMS,
            max_encode_tokens=slots * self.size.source_tokens,
            max_output_tokens=self.size.new_tokens,
            device=self.args.device,
            dtype=dtype,
        )
        return Ours(self.model, dtype, self.args.device, self.size.new_tokens, config)

    def row(self, dtype: str, count: int, timings: dict[str, list[Timing]]) -> dict[str, Any]:
        """What met, and what its rounds say."""
        return {
            "dtype": dtype,
            "generate_dtype": _generate_dtype(dtype),
            "rows_in": str(rows_in(self.args.device, dtype)).removeprefix("torch."),
            "compared_dtype": self.sixteen_or_full if "compared" in timings else None,
            "sequences": count,
            **engine_tables.summarise(timings, self.size.new_tokens - 1, self.floor(dtype, count)),
        }

    def floor(self, dtype: str, count: int) -> Floor:
        """Of a step on this machine."""
        read = step_bytes(self.weights, dtype, self.args.saved, count, self.size)
        multiplications = step_multiplications(self.weights, count, self.size)
        return Floor(read, 1e3 * read / self.bandwidth, 1e3 * multiplications / self.rate(dtype))

    def rate(self, dtype: str) -> float:
        """Multiplications a second of a large product in a dtype."""
        if dtype not in self.rates:
            self.rates[dtype] = measure_rate(self.args.device, dtype, self.args.saved)
        return self.rates[dtype]

    def best_batch(self, dtype: str, generate: Generate | GenerateApart, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """generate's best throughput, end to end, at any batch size, and ours at its best row."""
        found: dict[int, float] = {}
        for batch in self.args.best_batches:
            sources = random_sources(batch, self.size)
            try:
                generate.end_to_end(sources)
                seconds = [generate.end_to_end(sources) for _ in range(self.args.rounds)]
            except torch.OutOfMemoryError:
                _progress(f"{dtype}: generate has no memory for {batch} sequences")
                break
            finally:
                _collect(self.args.device)
            found[batch] = batch / Spread.of(seconds).median
            _progress(f"{dtype}: generate at {batch} sequences, {found[batch]:.2f} a second")
        return engine_tables.summarise_batches(dtype, found, rows)

    def memory(self, dtypes: list[str]) -> list[dict[str, Any]]:
        """Peak memory of both sides, each in a process of its own."""
        rows = []
        for dtype in dtypes:
            reference = _generate_dtype(dtype)
            try:
                ours, generate = self.peak("ours", dtype), self.peak("generate", reference)
            except subprocess.CalledProcessError as error:
                self.report.say(f"No memory figures for {dtype}: exit status {error.returncode}")
                continue
            work = {"dtype": dtype, "generate_dtype": reference, "sequences": self.args.memory_sequences}
            rows.append({**work, **engine_tables.summarise_memory(ours, generate)})
        return rows

    def peak(self, side: str, dtype: str) -> dict[str, int]:
        """Of one side, in bytes."""
        _progress(f"memory of {side} in {dtype}")
        args = self.args
        limit = args.max_output_tokens or self.size.new_tokens
        return peak_memory.measure(
            peak_memory.Work(
                side=side,
                folder=str(self.model),
                dtype=dtype,
                device=args.device,
                size=args.size,
                sequences=args.memory_sequences,
                threads=args.threads,
                max_output_tokens=limit,
            )
        )


def in_turn(contenders: dict[str, Contender], sources: list[list[int]], rounds: int) -> dict[str, list[Timing]]:
    """One full run each to warm up, then `rounds` of each in turn; whoever began a round comes last in the next."""
    for contender in contenders.values():
        contender.run(sources)
    timings: dict[str, list[Timing]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            time.sleep(PAUSE)
            timings[name].append(contenders[name].run(sources))
    return timings


def write_profile(ours: Ours, sources: list[list[int]], dtype: str, device: str, file: Path) -> None:
    """Append where the last N - 1 steps spend their time, by operation."""
    on_gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    timing = ours.run(sources, around_steps=profiler)
    events = profiler.key_averages()
    steps = ours.new_tokens - 1
    lines = [f"## {dtype}, {len(sources)} sequences", ""]
    lines.append(f"{1e3 * timing.steps / steps:.3f} ms a step under the profiler, over {steps} steps.")
    if on_gpu:
        kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
        busy = sum(event.self_device_time_total for event in kernels) / 1e3 / steps
        lines.append(f"Kernels take {busy:.3f} ms of it: the rest is the device waiting.")
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    lines += ["", "```", events.table(sort_by=order, row_limit=30, max_name_column_width=60), "```", "", ""]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write("\n".join(lines))


def _generate_dtype(dtype: str) -> str:
    """`generate` has no int8."""
    return "float32" if dtype == "int8" else dtype


def _collect(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=WEIGHT_BYTES, default=["float32", "bfloat16"])
    parser.add_argument("--sequences", nargs="+", type=int, help="default: 1 8 32, on cuda 1 8 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--saved", choices=["float32", "float16"], default="float32", help="the file's dtype")
    parser.add_argument("--peer", choices=["ctranslate2"])
    parser.add_argument("--peer-compute", default="int8", help="CTranslate2's compute_type")
    parser.add_argument("--best-batch", action="store_true", help="search generate's best throughput at any batch size")
    parser.add_argument("--best-batches", nargs="+", type=int, help="batch sizes of that search")
    parser.add_argument("--profile", type=Path, help="file that torch.profiler's tables are appended to")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-sequences", type=int, default=32)
    parser.add_argument(
        "--max-output-tokens", type=int, help="the engine's limit in the memory run; default: as forced"
    )
    parser.add_argument("--bandwidth-gib", type=float, help="size of the tensor read; default 1, on cuda 4")
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    args.sequences = args.sequences or ([1, 8, 64] if cuda else [1, 8, 32])
    args.best_batches = args.best_batches or ([1, 8, 32, 64, 128, 256] if cuda else [1, 4, 8, 16, 32])
    args.bandwidth_gib = args.bandwidth_gib or (4 if cuda else 1)
    if SIZES[args.size].new_tokens < 2 or args.rounds < 1:
        parser.error("at least two tokens and one round")
    return args


if __name__ == "__main__":
    main()
