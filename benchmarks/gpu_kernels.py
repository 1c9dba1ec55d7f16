"""The kernels of a decode step on CUDA, beside what the libraries offer: `python -m benchmarks.gpu_kernels`.

Each by itself, on made-up tensors of bert-base's sizes, 4 beams, 512 source tokens, bf16. Times are means over the
replays of a CUDA graph that holds the call 50 times, so launches are not in them; weights stay in the GPU's cache,
where a step's do not. Knows the kernels; `benchmarks.engine --device cuda` says what they add up to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine import triton_kernels
from benchmarks.report import Report

HIDDEN, FEED_FORWARD, HEADS, HEAD_SIZE, SOURCE, TARGET, BEAMS = 768, 3072, 12, 64, 512, 49, 4
COLUMNS = 30_528
CALLS = 50  # in a graph


def mean_us(call: Callable[[], Any], replays: int) -> float:
    """Mean microseconds of a call, recorded `CALLS` times and replayed."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    # torch gives them no types.
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    for _ in range(replays):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return 1e3 * milliseconds / (CALLS * replays)


def calls_of(sequences: int, dtype: torch.dtype = torch.bfloat16) -> dict[tuple[str, str], Callable[[], Any]]:
    """By operation and form."""
    rows = sequences * BEAMS

    def randoms(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    keys, values = (randoms(sequences, HEADS, TARGET, BEAMS, HEAD_SIZE) for _ in range(2))
    cross_keys, cross_values = (randoms(sequences, HEADS, SOURCE, HEAD_SIZE) for _ in range(2))
    ancestors = torch.randint(0, BEAMS, (sequences, BEAMS, TARGET), device="cuda")
    positions = torch.full((sequences,), 30, device="cuda")
    lengths = torch.full((sequences,), SOURCE, device="cuda")
    x, qkv, wide = randoms(rows, HIDDEN), randoms(rows, 3 * HIDDEN), randoms(rows, FEED_FORWARD)
    scale, shift = torch.ones_like(x[0]), torch.zeros_like(x[0])
    ours = triton_kernels
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("self-attention", "ours"): lambda: ours.self_attention(qkv, keys, values, ancestors, positions),
        ("cross-attention", "ours"): lambda: ours.cross_attention(x, cross_keys, cross_values, lengths),
        ("sum and norm", "ours"): lambda: ours.add_norm(x, x, scale, shift, 1e-12),
        ("sum and norm", "torch"): lambda: F.layer_norm(x + x, (HIDDEN,), scale, shift, 1e-12),
    }
    for outputs, given, activation in (
        (3 * HIDDEN, x, ""),
        (HIDDEN, x, ""),
        (FEED_FORWARD, x, "gelu"),
        (HIDDEN, wide, ""),
        (COLUMNS, x, ""),
    ):
        weight, bias = randoms(outputs, given.shape[1]) * 0.02, torch.zeros(outputs, device="cuda", dtype=dtype)
        name = f"product {outputs} x {given.shape[1]}{', ' + activation if activation else ''}"

        def cublas(given: Tensor = given, weight: Tensor = weight, bias: Tensor = bias, a: str = activation) -> Tensor:
            product = F.linear(given, weight, bias)
            return F.gelu(product) if a else product

        def kernel(given: Tensor = given, weight: Tensor = weight, bias: Tensor = bias, a: str = activation) -> Tensor:
            product: Tensor = ours.linear(given, weight, bias, a)
            return product

        calls[name, "torch"] = cublas
        if rows <= ours.MAX_ROWS[dtype]:
            calls[name, "ours"] = kernel
    return calls


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    report = Report("Kernels of a decode step on CUDA, bfloat16", "cuda")
    found = [
        {"sequences": count, "operation": operation, "form": form, "us": mean_us(call, arguments.replays)}
        for count in arguments.sequences
        for (operation, form), call in calls_of(count).items()
    ]
    report.table(
        ["sequences", "operation", "form", "microseconds"],
        [(row["sequences"], row["operation"], row["form"], f"{row['us']:.2f}") for row in found],
    )
    report.finish({"times": found}, arguments.output)


if __name__ == "__main__":
    main()
