"""Which form of each hot operation is fastest here? `python -m benchmarks.kernels [--dtype bfloat16]`.

Matrix products with packed, plain and 8-bit weights, in panels of ours, with weights kept in fp16 by FBGEMM, by
torch.compile and (if it is installed: the `bench` extra) by OpenVINO; a source's tokens over each other; a step's
attention, as an operation by itself and from rows to rows, as the engine does it; the best candidates of a vocabulary,
and what becomes of the beams.
Our kernels are measured wherever they work, whether the engine would choose them there or not. Times are medians of
repeated calls on made-up tensors of bert-base's sizes. It knows the operations and the caches that they read, not the
engine; `benchmarks.engine` says what they add up to.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.attention import attend, attend_source, attend_sources
from app.engine.beam_search import BeamState, keep
from app.engine.buckets import Buckets, round_up
from app.engine.kernels import cpu_kernels
from app.engine.kv_cache import CacheShape, KVCache, reserve
from app.engine.linear import (
    ACTIVATIONS,
    IDENTITY,
    Bfloat16PanelLinear,
    DenseLinear,
    Form,
    Int8Linear,
    Int8PanelLinear,
    Linear,
    PackedLinear,
    PanelLinear,
    Workspace,
    packs,
)
from app.engine.slot_options import SlotOptions
from app.engine.step_cache import StepCache
from app.engine.top_candidates import top_candidates
from benchmarks.report import Report, cores

HIDDEN, FEED_FORWARD, HEADS, HEAD_SIZE, SOURCE, BEAMS = 768, 3072, 12, 64, 512, 4
VOCABULARY, COLUMNS = 30_522, 30_528
MINILM_HIDDEN, HEAD_ROWS = 384, (4, 8, 16, 24, 32, 64, 128)
SOURCES = (64, 128, 256, 384, 512)
TARGET, WRITTEN = 48, 24  # positions: what self-attention's cache has room for, and what a step reads of it
MATRICES = 24  # the feed-forward matrices of 12 layers: 226 MB in fp32, more than a cache holds
LAYERS = 12  # attention reads the keys of each in turn, as a step does
COPIED_LAYERS = 3  # where each beam has keys of its own, 12 layers would not fit beside the rest: the time is scaled up
OPENVINO_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
CPU = torch.device("cpu")

Parts = list[tuple[Tensor, Tensor]]  # weights [out, in] and biases [out]


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a warmed call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


class Float16WeightsByFbgemm:
    """fp32's product with weights kept in fp16 by FBGEMM, as the engine once had it: panels of ours came in its place.

    It widens them as it multiplies, and goes through them once for every six rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self._product = torch.ops.quantized.linear_dynamic_fp16.default

    @staticmethod
    def is_available() -> bool:
        """Whether torch has FBGEMM for this processor."""
        return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

    def __call__(self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        """[..., in] fp32 -> [..., out] fp32."""
        product: Tensor = self._product(x, self.packed)
        return product if residual is None else product.add_(residual)


class Int8ByFbgemm:
    """Bytes by bytes, inputs rounded to 8 bits on one scale a row, as the engine once had it without VNNI.

    Weights have 7 bits: products are added in 16. Those are one of torch's quantised tensors while they are packed.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        largest = weight.abs().amax(1)
        rounded = (weight * (64 / largest)[:, None]).round().to(torch.int8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            zeros = torch.zeros(len(weight), dtype=torch.long)
            tensor = torch._make_per_channel_quantized_tensor(rounded, largest / (127 * 64), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(tensor, None)
        self._product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        """[..., in] fp32 -> [..., out] fp32."""
        largest = x.abs().amax(-1, keepdim=True)
        product = torch.addcmul(self.bias, self._product(x * (127 / largest), 1.0, 128, self.packed), largest)
        return product if residual is None else product.add_(residual)


def linear(all_rows: ListLike[int], repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Each form on `MATRICES` different weights in turn; int8 and panels take and give fp32 in either dtype."""
    exact = made_up_parts()
    parts = [(weight.to(dtype), bias.to(dtype)) for weight, bias in exact]
    layers: dict[str, list[Linear]] = {
        "plain": [DenseLinear(*part) for part in parts],
        **few_rows_layers(parts, dtype),
    }
    of_fp32: dict[str, list[Linear]] = {"int8 by oneDNN": [Int8Linear(*part) for part in exact]}
    if (kernels := cpu_kernels()) is not None:
        of_fp32["int8 in panels"] = [Int8PanelLinear(*part, kernels=kernels) for part in exact]
        if dtype is torch.bfloat16:
            of_fp32["panels in bf16"] = [Bfloat16PanelLinear(*part, kernels=kernels) for part in exact]
    if Float16WeightsByFbgemm.is_available():
        of_fp32["int8 by FBGEMM"] = [Int8ByFbgemm(*part) for part in exact]
    found = []
    for rows in all_rows:
        full = torch.randn(rows, HIDDEN)
        x = full.to(dtype)
        calls = {name: eager(of_form, x) for name, of_form in layers.items()}
        calls |= {name: eager(of_form, full) for name, of_form in of_fp32.items()}
        calls["torch.compile, frozen"] = compiled(parts, x)
        if util.find_spec("openvino") is not None:
            calls[f"OpenVINO {OPENVINO_NAMES[dtype]}"] = openvino(exact, full, OPENVINO_NAMES[dtype])
        found += timed(f"{MATRICES} products, {rows} rows", calls, repeats)
    return found


def timed(operation: str, calls: dict[str, Callable[[], Any]], repeats: int) -> list[dict[str, Any]]:
    """A row of the table for each form."""
    return [{"operation": operation, "form": name, "ms": median_ms(call, repeats)} for name, call in calls.items()]


def made_up_parts() -> Parts:
    """`MATRICES` weights [FEED_FORWARD, HIDDEN] and biases, in fp32, which fp16 does not hold exactly."""
    return [(torch.randn(FEED_FORWARD, HIDDEN), torch.randn(FEED_FORWARD)) for _ in range(MATRICES)]


def few_rows_forms(dtype: torch.dtype) -> dict[str, Form]:
    """The engine's that pack any weights of this dtype for few rows, and work here: oneDNN's; in fp32 also ours."""
    forms: dict[str, Form] = {}
    if packs(dtype):
        forms["packed"] = PackedLinear
    # Not `cpu_kernels_for`, which has them only where the engine chooses them.
    if dtype is torch.float32 and (kernels := cpu_kernels()) is not None:
        forms["panels"] = partial(PanelLinear, kernels=kernels)
    return forms


def few_rows_layers(parts: Parts, dtype: torch.dtype) -> dict[str, list[Linear]]:
    """In these forms; in fp32 also in those that keep weights in fp16, of the same weights rounded to it."""
    forms = few_rows_forms(dtype)
    layers = {name: [form(*part) for part in parts] for name, form in forms.items()}
    if dtype is not torch.float32:
        return layers
    rounded = [(weight.half().float(), bias) for weight, bias in parts]
    if "panels" in forms:
        layers["panels in fp16"] = [forms["panels"](*part) for part in rounded]
    if Float16WeightsByFbgemm.is_available():
        layers["kept in fp16, by FBGEMM"] = [Float16WeightsByFbgemm(*part) for part in rounded]
    return layers


def lm_head(hidden: int, repeats: int) -> list[dict[str, Any]]:
    """fp32's product with a matrix that the caches near a core do not hold, in the forms for few rows."""
    layers = few_rows_layers([(torch.randn(COLUMNS, hidden), torch.randn(COLUMNS))], torch.float32)
    found = []
    for rows in HEAD_ROWS:
        x = torch.randn(rows, hidden)
        calls = {name: eager(of_form, x) for name, of_form in layers.items()}
        found += timed(f"LM head, {hidden} wide, {rows} rows", calls, repeats)
    return found


def fused(all_rows: ListLike[int], repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What follows a packed product, or one in panels: as an operation of its own, and inside it."""
    parts = [(weight.to(dtype), bias.to(dtype)) for weight, bias in made_up_parts()]
    gelu = ACTIVATIONS["gelu"]
    layers = {
        name: ([form(*part, IDENTITY) for part in parts], [form(*part, gelu) for part in parts])
        for name, form in few_rows_forms(dtype).items()
    }

    def ways(name: str, x: Tensor, residual: Tensor) -> dict[str, Callable[[], Any]]:
        plain, activated = layers[name]
        return {
            f"{name}, gelu after it": lambda: [gelu.function(layer(x)) for layer in plain],
            f"{name}, gelu in it": lambda: [layer(x) for layer in activated],
            f"{name}, residual after it": lambda: [layer(x) + residual for layer in plain],
            f"{name}, residual in it": lambda: [layer(x, residual) for layer in plain],
        }

    found = []
    for rows in all_rows:
        x, residual = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, FEED_FORWARD).to(dtype)
        for name in layers:
            found += timed(f"{MATRICES} products, {rows} rows", ways(name, x, residual), repeats)
    return found


def eager(layers: list[Linear], x: Tensor) -> Callable[[], Any]:
    """One call after the other."""
    return lambda: [layer(x) for layer in layers]


def compiled(parts: Parts, x: Tensor) -> Callable[[], Any]:
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


def openvino(parts: Parts, x: Tensor, precision: str) -> Callable[[], Any]:
    """One OpenVINO model of all products, its weights constants, results left in its own memory."""
    import openvino as ov
    from openvino import opset13 as ops

    rows = ops.parameter([len(x), HIDDEN], ov.Type.f32)
    products = [ops.add(ops.matmul(rows, weight.numpy(), False, True), bias.numpy()) for weight, bias in parts]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.compile_model(ov.Model(products, [rows]), "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    return lambda: request.infer(share_inputs=True, share_outputs=True)


@dataclass(frozen=True)
class Caches:
    """The engine's, of `LAYERS` layers, with made-up content: SOURCE tokens of each source, WRITTEN of each target.

    Attributes:
        cache: of as many slots as there are sequences.
        target: the positions that a step reads.
        positions: where it writes.
        lengths: of the sources.
    """

    cache: KVCache
    target: int
    positions: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, sequences: int, dtype: torch.dtype) -> Caches:
        """Laid out as for the engine's steps: in 16 bits for a multiple of 16 positions, without gaps."""
        shape = CacheShape(LAYERS, BEAMS, HEADS, HEAD_SIZE, SOURCE, TARGET)
        cache = KVCache(shape, sequences, CPU, dtype, torch.float32)
        target = WRITTEN
        if dtype.itemsize == 2:
            needed = round_up(WRITTEN, Buckets.multiples(TARGET, SOURCE).target)
            target, _ = cache.make_room(sequences, needed, SOURCE)
        for held in (cache.self_kv, cache.cross_keys, cache.cross_values):
            held.normal_()
        cache.ancestors.random_(BEAMS)
        return cls(cache, target, torch.full((sequences,), WRITTEN - 1), torch.full((sequences,), SOURCE))

    def forms(self) -> dict[str, ModuleType | None]:
        """What the engine attends with; both take what a product has written and leave what the next one reads."""
        forms: dict[str, ModuleType | None] = {"torch's operations, rows to rows": None}
        if (kernels := cpu_kernels()) is not None:
            forms["our kernel, rows to rows"] = kernels
        return forms

    def begin(self, kernels: ModuleType | None) -> StepCache:
        """A step by these kernels, or by torch's operations, whatever the cache has chosen itself."""
        self.cache._kernels = kernels
        return self.cache.begin_step(self.positions, self.lengths, self.target, SOURCE, ragged=False)


def in_a_map(tensor: Tensor) -> Tensor:
    """A copy in memory of the caches' kind, whose large pages are worth something by themselves."""
    return reserve(tuple(tensor.shape), CPU, tensor.dtype).copy_(tensor)


def cross_attention(caches: Caches, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A step's, of `LAYERS` layers: four queries on 512 keys that they share.

    The first forms take queries by head, [S*H, K, D], and leave their results so. Those from rows to rows take what a
    product has written, [S*K, E], and leave what the next one reads: torch's operations are the first form between two
    changes of layout, our kernel reads and writes rows as they lie, in fp32.
    """
    sequences = caches.cache.capacity
    rows = torch.randn(sequences * BEAMS, HIDDEN).to(dtype) * HEAD_SIZE**-0.5
    alone = rows.view(-1, HEADS, 1, HEAD_SIZE)
    by_head = (sequences, HEADS, -1, HEAD_SIZE)
    query = rows.view(sequences, BEAMS, HEADS, HEAD_SIZE).transpose(1, 2).reshape(-1, BEAMS, HEAD_SIZE)
    keys, values = (held.flatten(1, 2) for held in (caches.cache.cross_keys, caches.cache.cross_values))
    transposed = in_a_map(keys.transpose(-1, -2))

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

    def of_a_step(kernels: ModuleType | None) -> Callable[[], Any]:
        step, given = caches.begin(kernels), rows if kernels is None else rows.float()
        return lambda: [step.cross_attention(layer, given) for layer in range(LAYERS)]

    replicated = [
        [in_a_map(layer.view(by_head).repeat_interleave(BEAMS, 0)) for layer in held[:COPIED_LAYERS]]
        for held in (keys, values)
    ]
    calls = {
        "two products, as `attend` takes them": of_layers(
            lambda k, v: attend(query, k, v, None), list(keys), list(values)
        ),
        "two products, queries left": of_layers(queries_left, list(keys.transpose(-1, -2)), list(values)),
        "two products, queries left, keys stored transposed": of_layers(queries_left, list(transposed), list(values)),
        "scaled_dot_product_attention": of_layers(stock, list(keys), list(values)),
        "scaled_dot_product_attention, keys a beam": of_layers(a_beam, *replicated),
    }
    calls |= {name: of_a_step(kernels) for name, kernels in caches.forms().items()}
    found = timed(f"cross-attention of {LAYERS} layers, {sequences} x {BEAMS}", calls, repeats)
    for row in found:
        if row["form"] == "scaled_dot_product_attention, keys a beam":
            row["ms"] *= LAYERS / COPIED_LAYERS
    return found


def self_attention(caches: Caches, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A step's, of `LAYERS` layers: each beam writes its newest key and value, and attends to its own history.

    From rows to rows, as above. The start of the step is in both times: there torch's operations make the mask.
    """
    sequences = caches.cache.capacity
    qkv = torch.randn(sequences * BEAMS, 3 * HIDDEN).to(dtype)
    qkv[:, :HIDDEN] *= HEAD_SIZE**-0.5
    full = qkv.float()

    def a_step(kernels: ModuleType | None) -> list[Tensor]:
        step, given = caches.begin(kernels), qkv if kernels is None else full
        return [step.self_attention(layer, given) for layer in range(LAYERS)]

    calls: dict[str, Callable[[], Any]] = {name: partial(a_step, kernels) for name, kernels in caches.forms().items()}
    operation = f"self-attention of {LAYERS} layers, {sequences} x {BEAMS}, {WRITTEN} written"
    return timed(operation, calls, repeats)


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

    forms = {"by torch": attend_source, "scaled_dot_product_attention": stock, "two products": products}
    calls = {name: of_layers(form) for name, form in forms.items()}
    if (kernels := cpu_kernels()) is not None:
        full = [qkv.float() for qkv in layers]
        calls["our kernel, of fp32"] = lambda: [attend_sources(qkv, [tokens], kernels=kernels) for qkv in full]
    return timed(f"encoder's attention of {LAYERS} layers, {tokens} tokens", calls, repeats)


def candidates(rows: int, repeats: int) -> list[dict[str, Any]]:
    """The 8 best continuations of each sequence's 4 beams."""
    scores = torch.randn(rows // BEAMS, BEAMS, COLUMNS)
    sums = torch.randn(rows // BEAMS, BEAMS)
    calls: dict[str, Callable[[], Any]] = {
        "topk over all": lambda: (scores + sums[:, :, None]).flatten(1).topk(2 * BEAMS),
        "blocks": lambda: top_candidates(scores, sums, 2 * BEAMS, VOCABULARY),
        "(log_softmax, before either)": lambda: torch.log_softmax(scores, -1, out=scores),
    }
    if (kernels := cpu_kernels()) is not None:
        calls["blocks, our kernel"] = lambda: kernels.top_candidates(scores, sums, 2 * BEAMS, VOCABULARY)
        calls["(log_softmax, our kernel)"] = lambda: kernels.log_softmax(scores)
    return timed(f"candidates, {rows} rows", calls, repeats)


def update(sequences: int, repeats: int) -> list[dict[str, Any]]:
    """What becomes of live and finished sets, of 4 beams with `WRITTEN` tokens each."""
    states = [BeamState.empty(sequences, BEAMS, TARGET + 1, CPU) for _ in range(2)]
    options = SlotOptions.empty(sequences, SOURCE, TARGET + 1, CPU)
    options.max_new_tokens[:] = TARGET
    for state in states:
        state.start(slice(0, sequences), 0)
        state.lengths[:] = WRITTEN
        state.is_running[:] = 0  # each call computes the same step
    scores = torch.randn(sequences, BEAMS, COLUMNS).log_softmax(-1)
    chosen = top_candidates(scores, torch.zeros(sequences, BEAMS), 2 * BEAMS, VOCABULARY)
    windows = [state.window(sequences, WRITTEN + 1) for state in states]
    calls: dict[str, Callable[[], Any]] = {"torch's operations": lambda: keep(windows[0], chosen, options, 1)}
    if (kernels := cpu_kernels()) is not None:
        calls["our kernel"] = lambda: kernels.keep(windows[1], chosen, options, 1)
    return timed(f"update of live and finished sets, {sequences} x {BEAMS}", calls, repeats)


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
    found = linear((*arguments.rows, 4 * SOURCE), arguments.repeats, dtype)
    for tokens in SOURCES:
        found += source_attention(tokens, arguments.repeats, dtype)
    for hidden in (MINILM_HIDDEN, HIDDEN):
        found += lm_head(hidden, arguments.repeats)
    found += fused(arguments.rows, arguments.repeats, dtype)
    for rows in arguments.rows:
        caches = Caches.of(rows // BEAMS, dtype)
        found += cross_attention(caches, arguments.repeats, dtype)
        found += self_attention(caches, arguments.repeats, dtype)
        found += candidates(rows, arguments.repeats)
        found += update(rows // BEAMS, arguments.repeats)
    report.table(["operation", "form", "ms"], [(row["operation"], row["form"], f"{row['ms']:.2f}") for row in found])
    report.finish({"times": found}, arguments.output)


if __name__ == "__main__":
    main()
