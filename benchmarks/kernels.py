"""Which form of each hot operation is fastest here? `python -m benchmarks.kernels [--rows 4 32 128]`.

Matrix products with packed, plain and 8-bit weights, by torch.compile and (if it is installed: the `bench` extra) by
OpenVINO; a few queries on shared keys; the best candidates of a vocabulary.
Times are medians of repeated calls on made-up tensors of bert-base's sizes. It knows the operations, not the engine;
`benchmarks.engine` says what they add up to.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.linear import ACTIVATIONS, DenseLinear, Int8Linear, Linear, MakeLinear, PackedLinear
from app.engine.models.bert2bert import attend
from app.engine.top_candidates import top_candidates
from benchmarks.report import Report, cores

HIDDEN, FEED_FORWARD, HEADS, HEAD_SIZE, SOURCE, BEAMS = 768, 3072, 12, 64, 512, 4
VOCABULARY, COLUMNS = 30_522, 30_528
MATRICES = 24  # the feed-forward matrices of 12 layers: 226 MB in fp32, more than a cache holds


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a warmed call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def linear_rows(rows: int, repeats: int) -> list[dict[str, Any]]:
    """Each form on `MATRICES` different weights in turn."""
    x = torch.randn(rows, HIDDEN)
    parts = [(torch.randn(FEED_FORWARD, HIDDEN), torch.randn(FEED_FORWARD)) for _ in range(MATRICES)]
    calls: dict[str, Callable[[], Any]] = {}
    forms: dict[str, MakeLinear] = {
        "plain": DenseLinear,
        "packed": PackedLinear,
        "int8": Int8Linear,
    }
    for name, form in forms.items():
        calls[name] = eager([form(*part) for part in parts], x)
    calls["torch.compile, frozen"] = compiled(parts, x)
    if util.find_spec("openvino") is not None:
        calls["OpenVINO fp32"] = openvino(parts, x)
    operation = f"{MATRICES} products, {rows} rows"
    return [{"operation": operation, "form": name, "ms": median_ms(call, repeats)} for name, call in calls.items()]


def fused(rows: int, repeats: int) -> list[dict[str, Any]]:
    """What follows a packed product: as an operation of its own, and as oneDNN's."""
    x, residual = torch.randn(rows, HIDDEN), torch.randn(rows, FEED_FORWARD)
    parts = [(torch.randn(FEED_FORWARD, HIDDEN), torch.randn(FEED_FORWARD)) for _ in range(MATRICES)]
    gelu = ACTIVATIONS["gelu"]
    plain, activated = [PackedLinear(*part) for part in parts], [PackedLinear(*part, gelu) for part in parts]
    calls: dict[str, Callable[[], Any]] = {
        "gelu after it": lambda: [gelu.function(layer(x)) for layer in plain],
        "gelu in it": lambda: [layer(x) for layer in activated],
        "residual after it": lambda: [layer(x) + residual for layer in plain],
        "residual in it": lambda: [layer(x, residual) for layer in plain],
    }
    operation = f"{MATRICES} products, {rows} rows"
    return [{"operation": operation, "form": name, "ms": median_ms(call, repeats)} for name, call in calls.items()]


def eager(layers: list[Linear], x: Tensor) -> Callable[[], Any]:
    """One call after the other."""
    return lambda: [layer(x) for layer in layers]


def compiled(parts: list[tuple[Tensor, Tensor]], x: Tensor) -> Callable[[], Any]:
    """inductor's code for this number of rows, with the weights packed into it as constants."""
    layers = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, FEED_FORWARD) for _ in parts).eval().requires_grad_(False)
    for layer, (weight, bias) in zip(layers, parts, strict=True):
        layer.weight, layer.bias = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))

    @torch.compile(options={"freezing": True}, dynamic=False)
    def products(rows: Tensor) -> list[Tensor]:
        return [layer(rows) for layer in layers]

    def call() -> list[Tensor]:
        with torch.no_grad():  # inductor freezes weights in no_grad, not in inference_mode
            return products(x)

    return call


def openvino(parts: list[tuple[Tensor, Tensor]], x: Tensor) -> Callable[[], Any]:
    """One OpenVINO model of all products, its weights constants, results left in its own memory."""
    import openvino as ov
    from openvino import opset13 as ops

    rows = ops.parameter([len(x), HIDDEN], ov.Type.f32)
    products = [ops.add(ops.matmul(rows, weight.numpy(), False, True), bias.numpy()) for weight, bias in parts]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.compile_model(ov.Model(products, [rows]), "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    return lambda: request.infer(share_inputs=True, share_outputs=True)


def attention(sequences: int, repeats: int) -> list[dict[str, Any]]:
    """A step's cross-attention of one layer: four queries on 512 keys."""
    query = torch.randn(sequences, HEADS, BEAMS, HEAD_SIZE)
    keys, values = torch.randn(2, sequences, HEADS, SOURCE, HEAD_SIZE)
    transposed = keys.transpose(-1, -2).contiguous()
    mask = torch.zeros(sequences, 1, SOURCE)
    replicated = [t.repeat_interleave(BEAMS, 0) for t in (keys, values)]
    alone = query.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [S*K, H, 1, D]
    wide = mask[:, None]
    calls: dict[str, Callable[[], Tensor]] = {
        "scaled_dot_product_attention, keys a beam": lambda: F.scaled_dot_product_attention(alone, *replicated),
        "scaled_dot_product_attention, keys shared": lambda: F.scaled_dot_product_attention(
            query, keys, values, attn_mask=wide
        ),
        "two products, keys shared": lambda: attend(query, keys.transpose(-1, -2), values, mask),
        "two products, keys shared and transposed": lambda: attend(query, transposed, values, mask),
    }
    operation = f"cross-attention, {sequences} x {BEAMS}"
    return [{"operation": operation, "form": name, "ms": median_ms(call, repeats)} for name, call in calls.items()]


def candidates(rows: int, repeats: int) -> list[dict[str, Any]]:
    """The 8 best continuations of each sequence's 4 beams."""
    scores = torch.randn(rows // BEAMS, BEAMS, COLUMNS)
    sums = torch.randn(rows // BEAMS, BEAMS)
    calls: dict[str, Callable[[], Any]] = {
        "topk over all": lambda: (scores + sums[:, :, None]).flatten(1).topk(2 * BEAMS),
        "blocks": lambda: top_candidates(scores, sums, 2 * BEAMS, VOCABULARY),
        "(log_softmax, before either)": lambda: scores.log_softmax(-1),
    }
    operation = f"candidates, {rows} rows"
    return [{"operation": operation, "form": name, "ms": median_ms(call, repeats)} for name, call in calls.items()]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 32, 128], help="sequences x 4 beams")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    report = Report("Forms of the hot operations")
    found: list[dict[str, Any]] = []
    for rows in (*arguments.rows, 4 * SOURCE):
        found += linear_rows(rows, arguments.repeats)
    for rows in arguments.rows:
        found += fused(rows, arguments.repeats)
        found += attention(rows // BEAMS, arguments.repeats)
        found += candidates(rows, arguments.repeats)
    report.table(["operation", "form", "ms"], [(row["operation"], row["form"], f"{row['ms']:.2f}") for row in found])
    report.finish({"times": found}, arguments.output)


if __name__ == "__main__":
    main()
