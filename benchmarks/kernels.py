"""Which form of each hot operation is fastest here? `python -m benchmarks.kernels [--dtype bfloat16]`.

Matrix products with packed, plain and 8-bit weights, by torch.compile and (if it is installed: the `bench` extra) by
OpenVINO; a source's tokens over each other; a few queries on shared keys; the best candidates of a vocabulary.
Times are medians of repeated calls on made-up tensors of bert-base's sizes. It knows the operations, not the engine;
`benchmarks.engine` says what they add up to.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.attention import attend, attend_source
from app.engine.linear import (
    ACTIVATIONS,
    DenseLinear,
    FewRowsInt8Linear,
    Float16WeightsLinear,
    Form,
    Linear,
    ManyRowsInt8Linear,
    PackedLinear,
)
from app.engine.top_candidates import top_candidates
from benchmarks.report import Report, cores

HIDDEN, FEED_FORWARD, HEADS, HEAD_SIZE, SOURCE, BEAMS = 768, 3072, 12, 64, 512, 4
VOCABULARY, COLUMNS = 30_522, 30_528
MINILM_HIDDEN, HEAD_ROWS = 384, (4, 8, 16, 24, 32, 64, 128)
SOURCES = (64, 128, 256, 384, 512)
MATRICES = 24  # the feed-forward matrices of 12 layers: 226 MB in fp32, more than a cache holds
LAYERS = 12  # attention reads the keys of each in turn, as a step does
COPIED_LAYERS = 3  # where each beam has keys of its own, 12 layers would not fit beside the rest: the time is scaled up
OPENVINO_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a warmed call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def linear_rows(rows: int, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Each form on `MATRICES` different weights in turn; int8 takes and gives fp32 in either dtype."""
    full = torch.randn(rows, HIDDEN)
    x = full.to(dtype)
    exact = made_up_parts()
    parts = [(weight.to(dtype), bias.to(dtype)) for weight, bias in exact]
    calls: dict[str, Callable[[], Any]] = {}
    forms: dict[str, Form] = {"plain": DenseLinear, "packed": PackedLinear}
    for name, form in forms.items():
        calls[name] = eager([form(*part) for part in parts], x)
    calls["int8 by oneDNN"] = eager([ManyRowsInt8Linear(*part) for part in exact], full)
    if Float16WeightsLinear.is_available() and dtype is torch.float32:
        calls["kept in fp16, by FBGEMM"] = eager([Float16WeightsLinear(*part) for part in exact], full)
    if FewRowsInt8Linear.is_available():
        calls["int8 by FBGEMM"] = eager([FewRowsInt8Linear(*part) for part in exact], full)
    calls["torch.compile, frozen"] = compiled(parts, x)
    if util.find_spec("openvino") is not None:
        calls[f"OpenVINO {OPENVINO_NAMES[dtype]}"] = openvino(exact, full, OPENVINO_NAMES[dtype])
    operation = f"{MATRICES} products, {rows} rows"
    return [{"operation": operation, "form": name, "ms": median_ms(call, repeats)} for name, call in calls.items()]


def made_up_parts() -> list[tuple[Tensor, Tensor]]:
    """`MATRICES` weights [FEED_FORWARD, HIDDEN] and biases, in fp32."""
    return [(torch.randn(FEED_FORWARD, HIDDEN), torch.randn(FEED_FORWARD)) for _ in range(MATRICES)]


def lm_head(rows: int, hidden: int, repeats: int) -> list[dict[str, Any]]:
    """fp32's product with a matrix that the caches near a core do not hold, in the two forms that the engine has."""
    part, x = (torch.randn(COLUMNS, hidden), torch.randn(COLUMNS)), torch.randn(rows, hidden)
    layers: dict[str, Linear] = {"packed": PackedLinear(*part)}
    if Float16WeightsLinear.is_available():
        layers["kept in fp16, by FBGEMM"] = Float16WeightsLinear(*part)
    operation = f"LM head, {hidden} wide, {rows} rows"
    return [
        {"operation": operation, "form": name, "ms": median_ms(eager([layer], x), repeats)}
        for name, layer in layers.items()
    ]


def fused(rows: int, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What follows a packed product: as an operation of its own, and as oneDNN's."""
    x, residual = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, FEED_FORWARD).to(dtype)
    parts = [(weight.to(dtype), bias.to(dtype)) for weight, bias in made_up_parts()]
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


def openvino(parts: list[tuple[Tensor, Tensor]], x: Tensor, precision: str) -> Callable[[], Any]:
    """One OpenVINO model of all products, its weights constants, results left in its own memory."""
    import openvino as ov
    from openvino import opset13 as ops

    rows = ops.parameter([len(x), HIDDEN], ov.Type.f32)
    products = [ops.add(ops.matmul(rows, weight.numpy(), False, True), bias.numpy()) for weight, bias in parts]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.compile_model(ov.Model(products, [rows]), "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    return lambda: request.infer(share_inputs=True, share_outputs=True)


def attention(sequences: int, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A step's cross-attention of `LAYERS` layers: four queries on 512 keys that they share."""
    rows = sequences * HEADS
    query = torch.randn(rows, BEAMS, HEAD_SIZE).to(dtype) * HEAD_SIZE**-0.5
    keys, values = (torch.randn(LAYERS, rows, SOURCE, HEAD_SIZE).to(dtype) for _ in range(2))
    transposed = keys.transpose(-1, -2).contiguous()
    by_head = (sequences, HEADS, -1, HEAD_SIZE)
    alone = query.view(sequences, HEADS, BEAMS, HEAD_SIZE).transpose(1, 2).reshape(-1, HEADS, 1, HEAD_SIZE)

    def stock(keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query.view(by_head), keys.view(by_head), values.view(by_head), scale=1.0)

    def a_beam(keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(alone, keys, values, scale=1.0)

    def queries_left(keys: Tensor, values: Tensor) -> Tensor:
        """`keys` is [B, D, W]."""
        return torch.bmm(torch.bmm(query, keys).softmax(-1), values)

    def of_layers(
        form: Callable[[Tensor, Tensor], Tensor], keys: ListLike[Tensor], values: ListLike[Tensor]
    ) -> Callable[[], Any]:
        return lambda: [form(k, v) for k, v in zip(keys, values, strict=True)]

    replicated = [
        [layer.view(by_head).repeat_interleave(BEAMS, 0) for layer in cache[:COPIED_LAYERS]] for cache in (keys, values)
    ]
    calls = {
        "two products, keys left (ours)": of_layers(lambda k, v: attend(query, k, v, None), list(keys), list(values)),
        "two products, queries left": of_layers(queries_left, list(keys.transpose(-1, -2)), list(values)),
        "two products, queries left, keys stored transposed": of_layers(queries_left, list(transposed), list(values)),
        "scaled_dot_product_attention": of_layers(stock, list(keys), list(values)),
        "scaled_dot_product_attention, keys a beam": of_layers(a_beam, *replicated),
    }
    scale = {"scaled_dot_product_attention, keys a beam": LAYERS / COPIED_LAYERS}
    operation = f"cross-attention of {LAYERS} layers, {sequences} x {BEAMS}"
    return [
        {"operation": operation, "form": name, "ms": median_ms(call, repeats) * scale.get(name, 1.0)}
        for name, call in calls.items()
    ]


def source_attention(tokens: int, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One source's attention in `LAYERS` layers of the encoder, from the product of queries, keys and values."""
    layers = [torch.randn(tokens, 3, HEADS, HEAD_SIZE).to(dtype) for _ in range(LAYERS)]

    def stock(qkv: Tensor) -> Tensor:
        query, keys, values = qkv.permute(1, 2, 0, 3)[:, None]
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0)[0].transpose(0, 1).flatten(1)

    def products(qkv: Tensor) -> Tensor:
        query, keys, values = qkv.permute(1, 2, 0, 3).contiguous()
        return torch.bmm(torch.bmm(query, keys.transpose(1, 2)).softmax(-1), values).transpose(0, 1).flatten(1)

    def of_layers(form: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: [form(qkv) for qkv in layers]

    forms = {"ours": attend_source, "scaled_dot_product_attention": stock, "two products": products}
    operation = f"encoder's attention of {LAYERS} layers, {tokens} tokens"
    return [
        {"operation": operation, "form": name, "ms": median_ms(of_layers(form), repeats)}
        for name, form in forms.items()
    ]


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
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    dtype = getattr(torch, arguments.dtype)
    report = Report(f"Forms of the hot operations, {arguments.dtype}")
    found: list[dict[str, Any]] = []
    for rows in (*arguments.rows, 4 * SOURCE):
        found += linear_rows(rows, arguments.repeats, dtype)
    for tokens in SOURCES:
        found += source_attention(tokens, arguments.repeats, dtype)
    for hidden, rows in itertools.product((MINILM_HIDDEN, HIDDEN), HEAD_ROWS):
        found += lm_head(rows, hidden, arguments.repeats)
    for rows in arguments.rows:
        found += fused(rows, arguments.repeats, dtype)
        found += attention(rows // BEAMS, arguments.repeats, dtype)
        found += candidates(rows, arguments.repeats)
    report.table(["operation", "form", "ms"], [(row["operation"], row["form"], f"{row['ms']:.2f}") for row in found])
    report.finish({"times": found}, arguments.output)


if __name__ == "__main__":
    main()
