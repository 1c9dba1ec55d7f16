"""What a decode step is made of, and which part stands how far above the hardware: `python -m benchmarks.step`.

The work of `benchmarks.engine` (random bert-base2bert-base, sources of 512 tokens, 4 beams). The whole step and the
network in it are timed in a running engine, at the middle of 48 tokens; then two parts of the network by themselves, in
the same process and with the engine's own weights and functions:

- products: every matrix product of a step with what follows in it, one after the other, the LM head last;
- attention: self- and cross-attention of each layer, from rows to rows, with what is written to the cache: by kernels
  of ours where the engine takes them, else by torch's operations with their changes of layout; on caches of the
  engine's shape, with content of each layer's own.

What is left of the network is norms, embeddings and the interpreter; what is left of the step is its start (a mask for
all layers, where torch's operations attend) and the choice of tokens: log-softmax, processors, candidates, beams. The
bound of a part is the longer of its bytes over the measured bandwidth and its multiplications over the measured rate.
Where products alone stand twice above the floor, no step built of them can be within twice of it.

Knows the engine's network from inside. Does not compare it with other engines: benchmarks/engine.py does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.engine import Engine, EngineConfig, Sequence
from app.engine.buckets import round_up
from app.engine.kv_cache import KVCache
from app.engine.models.bert_decoder import BertDecoder
from app.engine.models.encoder_decoder import EncoderDecoder
from app.engine.step_cache import StepCache
from benchmarks.contenders import BEAMS, SIZES, Size, forced, random_sources, write_checkpoint
from benchmarks.floor import KV_BYTES, WEIGHT_BYTES, decoder_weights
from benchmarks.hardware import measure_bandwidth, measure_rate
from benchmarks.report import Report, cores, significant


class ClockedModel:
    """A network whose decode steps are timed; everything else is the network's own."""

    def __init__(self, model: EncoderDecoder) -> None:
        self.model = model
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def decode(self, ids: Tensor, positions: Tensor, cache: StepCache) -> Tensor:
        """The network's, timed."""
        started = time.perf_counter()
        logits = self.model.decode(ids, positions, cache)
        self.seconds.append(time.perf_counter() - started)
        return logits


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    report = Report("What a decode step is made of")
    bandwidth = measure_bandwidth("cpu", args.bandwidth_gib)["read"]
    report.say(f"Threads: {args.threads}. {bandwidth / 1e9:.1f} GB/s reading; milliseconds, medians.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, size)
        weights = decoder_weights(folder)
        found = [
            parts(folder, size, dtype, count, weights, bandwidth, args.repeats)
            for dtype in args.dtypes
            for count in args.sequences
        ]
    headers = ["dtype", "seqs", "step", "network", "products", "their bound", "ratio", "attention", "its bound"]
    headers += ["rest of the network", "choice", "floor", "step / floor", "products / floor"]
    names: tuple[str, ...] = (
        "step",
        "network",
        "products",
        "products_bound",
        "products_ratio",
        "attention",
        "attention_bound",
    )
    names += ("rest", "choice", "floor", "step_over_floor", "products_over_floor")
    report.table(headers, [[row["dtype"], row["sequences"], *(f"{row[n]:.2f}" for n in names)] for row in found])
    report.finish({"threads": args.threads, "bandwidth": bandwidth, "parts": found}, args.output)


@torch.inference_mode()
def parts(
    folder: Path, size: Size, dtype: str, count: int, weights: int, bandwidth: float, repeats: int
) -> dict[str, Any]:
    """One row: milliseconds of each part, and their bounds."""
    config = EngineConfig(
        max_num_seqs=count,
        max_num_beams=BEAMS,
        max_encode_tokens=count * size.source_tokens,
        max_output_tokens=size.new_tokens,
        dtype=dtype,
    )
    engine = Engine.from_folder(folder, config)
    for ids in random_sources(count, size):
        engine.add(Sequence(tuple(ids), forced(size.new_tokens)))
    engine.step()
    (batch,) = engine.runner.batches.values()
    model = batch.model
    assert isinstance(model.decoder, BertDecoder)
    clocked: Any = ClockedModel(model)
    batch.model = clocked
    seconds: list[float] = []
    while engine.scheduler.has_work:
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    third = len(seconds) // 3
    step, network = (statistics.median(held[third : 2 * third]) for held in (seconds, clocked.seconds))
    products = _median(_products(model.decoder, count * BEAMS), repeats)
    attention = _median(_attention(engine, model.decoder, count, size), repeats)
    mean_target = (size.new_tokens + 2) / 2
    cached = 2 * size.layers * count * (size.source_tokens + BEAMS * mean_target) * size.hidden
    multiplications = 2 * size.layers * count * BEAMS * (size.source_tokens + BEAMS * mean_target) * size.hidden
    rate = measure_rate("cpu", dtype)
    weight_seconds, cache_seconds = weights * WEIGHT_BYTES[dtype] / bandwidth, cached * KV_BYTES[dtype] / bandwidth
    products_bound = max(weight_seconds, count * BEAMS * weights / rate)
    attention_bound = max(cache_seconds, multiplications / rate)
    floor = weight_seconds + cache_seconds
    row = {
        "step": step,
        "network": network,
        "products": products,
        "products_bound": products_bound,
        "attention": attention,
        "attention_bound": attention_bound,
        "rest": network - products - attention,
        "choice": step - network,
        "floor": floor,
    }
    row = {name: significant(1e3 * value) for name, value in row.items()}
    row["products_ratio"] = significant(products / products_bound)
    row["step_over_floor"] = significant(step / floor)
    row["products_over_floor"] = significant(products / floor)
    print(f"{dtype}, {count}: {row}", file=sys.stderr, flush=True)
    return {"dtype": dtype, "sequences": count, **row}


def _products(decoder: BertDecoder, rows: int) -> Callable[[], object]:
    """All of a step, each on rows that lie in a cache."""
    x = torch.randn(rows, decoder.config.hidden_size).to(decoder.dtype)
    wide = decoder.layers[0].intermediate(x)

    def run() -> None:
        for layer in decoder.layers:
            layer.qkv(x)
            layer.attention_output(x, x)
            layer.cross_query(x)
            layer.cross_output(x, x)
            layer.intermediate(x)
            layer.output(wide, x)
        decoder.lm_head.transform(x)
        decoder.lm_head.decoder(x)

    return run


def _attention(engine: Engine, decoder: BertDecoder, count: int, size: Size) -> Callable[[], object]:
    """All layers of a step, at the middle of the target, on caches laid out as the engine's are there."""
    buckets, written = engine.runner.buckets, (size.new_tokens + 2) // 2
    target, source = round_up(written, buckets.target), round_up(size.source_tokens, buckets.source)
    cache = KVCache(
        engine.runner.cache_shape(BEAMS), count, torch.device("cpu"), decoder.attention_dtype, decoder.dtype
    )
    if buckets.compact:
        target, source = cache.make_room(count, target, source)
    for held in (cache.self_kv, cache.cross_keys, cache.cross_values):
        held.normal_()
    cache.ancestors.random_(BEAMS)
    positions, lengths = torch.full((count,), written - 1), torch.full((count,), size.source_tokens)
    step = cache.begin_step(positions, lengths, target, source, ragged=size.source_tokens < source)
    qkv = torch.randn(count * BEAMS, 3 * size.hidden).to(decoder.dtype)
    query = qkv[:, : size.hidden].mul_(decoder.config.head_size**-0.5).contiguous()

    def run() -> None:
        for layer in range(len(decoder.layers)):
            step.self_attention(layer, qkv)
            step.cross_attention(layer, query)

    return run


def _median(work: Callable[[], object], repeats: int) -> float:
    """Seconds, warm."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=WEIGHT_BYTES, default=["bfloat16", "int8", "float32"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bandwidth-gib", type=float, default=1.0, help="size of the tensor read")
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    main()
