"""The kernels of a decode step on CUDA, beside what the libraries offer: `python -m benchmarks.gpu_kernels`.

On made-up tensors of bert-base's sizes, 4 beams, 512 source tokens, bf16: each kernel, each product in several tiles,
and a layer of them as a decoder runs it. A time is the least of several replays of a CUDA graph that holds the call for
each of twelve layers' weights and caches in turn, or more where those are small: launches are not in it, weights come
from memory as a step's do, and what else the GPU does at times is left out. Everything twice, one kernel behind the
other and with overlapping launches. Knows the kernels; `benchmarks.engine --device cuda` says what they add up to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine import triton_kernels as ours
from app.engine.linear import ACTIVATIONS, IDENTITY, FewRowsLinear
from app.engine.models.layers import KernelLayerNorm
from app.engine.triton_kernels import launch, products
from app.engine.triton_kernels.products import Tile
from benchmarks.report import Report

HIDDEN, FEED_FORWARD, HEADS, HEAD_SIZE, SOURCE, TARGET, BEAMS = 768, 3072, 12, 64, 512, 49, 4
COLUMNS = 30_528
LAYERS = 12
LEAST_BYTES = 2**28  # of all copies of a product's weights: several times what the cache holds
EPS = 1e-12

Call = Callable[[int], Any]  # of a layer
TILES = (
    Tile(16, 1024, 4, 4, 2),
    Tile(16, 1024, 8, 8, 2),
    Tile(16, 1024, 1, 4, 2),
    Tile(32, 1024, 4, 8, 2),
    Tile(16, 256, 1, 2, 4),
    Tile(64, 128, 1, 4, 4),
)


class Product(NamedTuple):
    """Of a BERT's layer, or the LM head."""

    name: str
    outputs: int
    inputs: int
    activation: str = ""


PRODUCTS = (
    Product("qkv", 3 * HIDDEN, HIDDEN),
    Product("output, query", HIDDEN, HIDDEN),
    Product("feed-forward 1", FEED_FORWARD, HIDDEN, "gelu"),
    Product("feed-forward 2", HIDDEN, FEED_FORWARD),
    Product("LM head", COLUMNS, HIDDEN),
)


def randoms(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def least_us(call: Call, replays: int, layers: int) -> float:
    """Microseconds of a call, recorded for each layer and replayed."""
    for layer in (0, layers - 1):
        call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            call(layer)
    graph.replay()
    least = float("inf")
    for _ in range(replays):
        # torch gives them no types.
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        least = min(least, began.elapsed_time(ended))
    return 1e3 * least / layers


def product_calls(product: Product, rows: int) -> tuple[dict[str, Call], int]:
    """By form, and how many copies of the weights they take in turn; `torch` is cuBLAS, and an activation behind it."""
    copies = max(LAYERS, -(-LEAST_BYTES // (2 * product.outputs * product.inputs)))
    weights = [randoms(product.outputs, product.inputs) * 0.02 for _ in range(copies)]
    bias, x = randoms(product.outputs), randoms(rows, product.inputs)

    def library(layer: int) -> Tensor:
        y = F.linear(x, weights[layer], bias)
        return F.gelu(y) if product.activation else y

    def kernel(tile: Tile | None, layer: int) -> Tensor:
        if product.inputs > products.PART:
            return ours.linear_in_parts(x, weights[layer], bias, tile)
        return ours.linear(x, weights[layer], bias, product.activation, tile)

    calls: dict[str, Call] = {"torch": library}
    if rows <= ours.MAX_ROWS[torch.bfloat16]:
        calls["as chosen"] = partial(kernel, None)
        for tile in TILES:
            shown = " ".join(f"{name}={value}" for name, value in tile._asdict().items())
            calls[shown] = partial(kernel, tile)
    return calls, copies


@dataclass(frozen=True)
class Caches:
    """Of `LAYERS` layers and so many sequences."""

    own: Tensor
    cross: Tensor
    ancestors: Tensor
    positions: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, sequences: int) -> Caches:
        """All full, targets in their middle."""
        return cls(
            own=randoms(LAYERS, 2, sequences, HEADS, TARGET, BEAMS, HEAD_SIZE),
            cross=randoms(LAYERS, 2, sequences, HEADS, SOURCE, HEAD_SIZE),
            ancestors=torch.randint(0, BEAMS, (sequences, BEAMS, TARGET), device="cuda"),
            positions=torch.full((sequences,), 30, device="cuda"),
            lengths=torch.full((sequences,), SOURCE, device="cuda"),
        )

    def self_attention(self, qkv: Tensor, layer: int) -> Tensor:
        """Of one layer."""
        keys, values = self.own[layer]
        return ours.self_attention(qkv, keys, values, self.ancestors, self.positions)

    def cross_attention(self, query: Tensor, parts: int | None, layer: int) -> Tensor:
        """Of one layer, in so many parts of the source; None as the engine takes it."""
        keys, values = self.cross[layer]
        return ours.cross_attention(query, keys, values, self.lengths, parts)


def small_calls(caches: Caches, rows: int) -> dict[tuple[str, str], Call]:
    """Attention, norms, log-probabilities."""
    x, logits = randoms(rows, HIDDEN), randoms(rows // BEAMS, BEAMS, COLUMNS)
    one, zero = torch.ones_like(x[0]), torch.zeros_like(x[0])
    calls: dict[tuple[str, str], Call] = {
        ("self-attention", "ours"): partial(caches.self_attention, randoms(rows, 3 * HIDDEN)),
        ("sum and norm", "ours"): lambda _: ours.add_norm(x, x, one, zero, EPS),
        ("sum and norm", "torch"): lambda _: F.layer_norm(x + x, (HIDDEN,), one, zero, EPS),
        ("log-probabilities", "ours"): lambda _: ours.log_softmax(logits),
        ("log-probabilities", "torch"): lambda _: logits.float().log_softmax(-1),
    }
    for parts in (1, 2, 4, 8):
        calls["cross-attention", f"{parts} parts"] = partial(caches.cross_attention, x, parts)
    return calls


def layer_call(caches: Caches, rows: int) -> Call:
    """A decoder layer, each from what the one before it left."""
    sizes = {name: (outputs, inputs) for name, outputs, inputs, _ in PRODUCTS}

    def linears(name: str, activation: str = "") -> list[FewRowsLinear]:
        outputs, inputs = sizes[name]
        function = ACTIVATIONS[activation] if activation else IDENTITY
        return [
            FewRowsLinear(randoms(outputs, inputs) * 0.02, randoms(outputs), function, kernels=ours)
            for _ in range(LAYERS)
        ]

    qkv, output, query, cross_output = (linears(n) for n in ("qkv", *["output, query"] * 3))
    wide, narrow = linears("feed-forward 1", "gelu"), linears("feed-forward 2")
    x = randoms(rows, HIDDEN)
    norm = KernelLayerNorm(torch.ones_like(x[0]), torch.zeros_like(x[0]), EPS, ours)
    held = [x]

    def call(layer: int) -> None:
        y = x if layer == 0 else held[0]
        y = norm.of_sum(output[layer], caches.self_attention(qkv[layer](y), layer), y)
        y = norm.of_sum(cross_output[layer], caches.cross_attention(query[layer](y), None, layer), y)
        held[0] = norm.of_sum(narrow[layer], wide[layer](y), y)

    return call


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--output", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    report = Report("Kernels of a decode step on CUDA, bfloat16", "cuda")
    found: list[dict[str, Any]] = []

    def measure(sequences: int, operation: str, form: str, call: Call, copies: int = LAYERS) -> None:
        row: dict[str, Any] = {"sequences": sequences, "operation": operation, "form": form}
        for name, overlapping in (("us", False), ("overlapping_us", True)):
            launch.overlapping = overlapping
            row[name] = least_us(call, arguments.replays, copies)
        found.append(row)

    for count in arguments.sequences:
        rows, caches = count * BEAMS, Caches.of(count)
        measure(count, "decoder layer", "as the engine runs it", layer_call(caches, rows))
        for (operation, form), call in small_calls(caches, rows).items():
            measure(count, operation, form, call)
        for product in PRODUCTS:
            calls, copies = product_calls(product, rows)
            for form, call in calls.items():
                measure(count, f"{product.name} {product.outputs} x {product.inputs}", form, call, copies)
    report.table(
        ["sequences", "operation", "form", "microseconds", "overlapping"],
        [
            (row["sequences"], row["operation"], row["form"], f"{row['us']:.2f}", f"{row['overlapping_us']:.2f}")
            for row in found
        ],
    )
    report.finish({"times": found}, arguments.output)


if __name__ == "__main__":
    main()
