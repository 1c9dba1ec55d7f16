"""Whether a device has kernels of ours: asked where something is built that could use them, and found out once.

Found out by running them beside torch: a device on which they do not compile, do not fit, or give other answers has
none.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine import beam_search
from app.engine.logits_processors import ban, completes_ngram
from app.engine.philox import gumbel_noise
from app.engine.slot_options import SlotOptions
from app.engine.top_candidates import Candidates

logger = logging.getLogger(__name__)
# Of products in fp32 and in bf16, in turn, when it is found out which are faster.
ROUNDS = 20


def kernels_for(device: torch.device) -> ModuleType | None:
    """`app.engine.triton_kernels` on CUDA where Triton works (CUDA builds of torch bring it), else None."""
    return _working(device) if device.type == "cuda" else None


def step_kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Those of a decode step's attention and choice: `kernels_for` on CUDA, `cpu_kernels_for` on a CPU."""
    return cpu_kernels_for(device, dtype) if device.type == "cpu" else kernels_for(device)


def cpu_kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`app.engine.cpu_kernels` where they were measured to be faster: rows in fp32, on x86 with AVX2 or AVX-512.

    For products, attention and the choice of tokens. With AVX-512 and no VNNI there are none with vectors of that
    length, and oneDNN's are not shorter.

    Args:
        device: where the rows are.
        dtype: the rows'; weights and caches may be kept in 16 bits.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu" or dtype is not torch.float32 or capability not in ("AVX2", "AVX512"):
        return None
    return None if capability == "AVX512" and not torch.cpu._is_vnni_supported() else cpu_kernels()


def int8_kernels_for(device: torch.device, few_rows: bool) -> ModuleType | None:
    """The same for products in 8 bits: of few rows, and of many where there is no VNNI.

    Without it a library's have weights of 7 bits; with it they multiply bytes by bytes, which pays where rows are many.
    """
    if device.type != "cpu" or not (few_rows or not torch.cpu._is_vnni_supported()):
        return None
    return cpu_kernels()


def has_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16; how fast they are is another question."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_bfloat16_in_fp32(device: torch.device) -> bool:
    """Whether weights in bf16 are multiplied by kernels of ours, which widen them, with rows in fp32.

    So where these kernels are, on processors that have no instructions for bf16, or slow ones.
    """
    return cpu_kernels_for(device, torch.float32) is not None and not _bfloat16_is_faster()


@cache
def _bfloat16_is_faster() -> bool:
    """Whether the library's product of many rows takes clearly less time in bf16 than in fp32, on this processor.

    Asked by measurement, for a tenth of a second or so: there are instructions for bf16 with 16 times the rate of those
    for fp32 (AMX), with twice the rate (AMD's of AVX-512), and with half of it (Intel's), and none near the same rate.
    """
    if not has_bfloat16():
        return False
    x, weight = torch.ones(256, 768), torch.ones(768, 768)
    operands = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    times = dict.fromkeys(operands, math.inf)
    for _ in range(ROUNDS):  # in turn: what else a machine does for a moment would else be one dtype's alone
        for dtype, (rows, weights) in operands.items():
            started = time.perf_counter()
            F.linear(rows, weights)
            times[dtype] = min(times[dtype], time.perf_counter() - started)
    ratio = times[torch.float32] / times[torch.bfloat16]
    faster = ratio > 1.25
    logger.info(
        "products in bfloat16 are %.2f times as fast as in fp32: they are%s used", ratio, "" if faster else " not"
    )
    return faster


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has instructions for it: of others fp32's and fp16's kernels are good, bf16's may not compile."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _working(device: torch.device) -> ModuleType | None:
    """The kernels, once they have given torch's answers: Triton needs a C compiler and Python's headers, too."""
    try:
        kernels = importlib.import_module("app.engine.triton_kernels")
        for dtype in (torch.float32, torch.float16, *((torch.bfloat16,) if computes_bfloat16(device) else ())):
            check(kernels, device, dtype)
    except Exception as error:
        logger.warning("a decode step is made of torch's operations alone: %s", error)
        return None
    return kernels


@cache
def cpu_kernels() -> ModuleType | None:
    """`app.engine.cpu_kernels` where they work, faster or not: once they have given torch's answers."""
    try:
        kernels = importlib.import_module("app.engine.cpu_kernels")
        for caches in (torch.float32, torch.bfloat16):
            check_attention(kernels, torch.device("cpu"), torch.float32, caches)
        check_source_attention(kernels)
        check_products(kernels)
        check_choice(kernels)
        check_draws(kernels)
    except Exception as error:
        logger.warning("a decode step is made of torch's operations alone: %s", error)
        return None
    return kernels


def check(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Run those that ask most of a GPU, in the shapes that do, beside torch in fp64.

    Raises:
        ValueError: one gives another answer; what it raises itself where it cannot be compiled or run.
    """
    check_attention(kernels, device, dtype)
    randoms = _Randoms(device, dtype)
    bias = randoms(8192)
    for outputs, inputs in ((48, 1024), (48, 1536), (8192, 512)):  # of a layer, in two tiles, of an LM head
        x, weight = randoms(4, inputs), randoms(outputs, inputs) / inputs**0.5
        if not kernels.takes(x, weight, ""):
            continue
        product = F.linear(x.double(), weight.double(), bias[:outputs].double())
        _synchronise(device)  # weights are read before the kernel ahead has ended
        _compare("a product", kernels.linear(x, weight, bias[:outputs], ""), product)
    x, weight, residual = randoms(4, 3072), randoms(48, 3072) / 3072**0.5, randoms(4, 48)
    total = F.linear(x.double(), weight.double(), bias[:48].double()) + residual.double()
    _synchronise(device)
    parts = kernels.linear_in_parts(x, weight, bias[:48])
    ones, zeros = torch.ones_like(bias[:48]), torch.zeros_like(bias[:48])
    _compare("a norm", kernels.add_norm(parts, residual, ones, zeros, 1e-5), F.layer_norm(total, (48,)))
    logits = randoms(1, 4, 8192)
    _compare("a log-softmax", kernels.log_softmax(logits), logits.double().log_softmax(-1))


def check_attention(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, caches: torch.dtype | None = None
) -> None:
    """The same of attention alone: two heads of one sequence; with `caches` in another dtype."""
    randoms = _Randoms(device, dtype)

    def cached(*shape: int) -> Tensor:
        return randoms(*shape).to(caches or dtype)

    query, keys, values = randoms(4, 128) / 8, cached(1, 2, 512, 64), cached(1, 2, 512, 64)
    lengths = torch.full((1,), 300, device=device)
    _synchronise(device)
    attended = kernels.cross_attention(query, keys, values, lengths)
    _compare("cross-attention", attended, _attend(query, keys[0, :, :300], values[0, :, :300]))
    # Two positions; in the first, beam k's history is what beam 3 - k wrote.
    qkv, keys, values = randoms(4, 384) / 8, cached(1, 2, 2, 4, 64), cached(1, 2, 2, 4, 64)
    ancestors, position = torch.arange(4, device=device).flip(0).repeat(2, 1).T[None].contiguous(), lengths // lengths
    _synchronise(device)
    attended = kernels.self_attention(qkv, keys, values, ancestors, position)
    newest = qkv.view(4, 3, 2, 64).transpose(1, 2).to(keys.dtype)  # [K, H, 3, D]
    for beam in range(4):
        own_keys = torch.stack([keys[0, :, 0, 3 - beam], newest[beam, :, 1]], 1)
        own_values = torch.stack([values[0, :, 0, 3 - beam], newest[beam, :, 2]], 1)
        expected = _attend(qkv[beam : beam + 1, :128], own_keys, own_values)
        _compare("self-attention", attended[beam : beam + 1], expected)


def check_source_attention(kernels: ModuleType) -> None:
    """The same of `app.engine.cpu_kernels`' attention of whole sources: two of them, one in more than one block."""
    qkv = _Randoms(torch.device("cpu"), torch.float32)(70, 3, 2, 48) / 48**0.25
    attended = kernels.source_attention(qkv, [17, 53])
    for own, found in zip(torch.split(qkv, [17, 53]), torch.split(attended, [17, 53]), strict=True):
        query, keys, values = own.transpose(0, 1)
        expected = _attend(query.flatten(1), keys.transpose(0, 1), values.transpose(0, 1))
        _compare("a source's attention", found, expected)


def check_products(kernels: ModuleType) -> None:
    """The same of `app.engine.cpu_kernels`' products: few rows and many, weights in every dtype."""
    randoms = _Randoms(torch.device("cpu"), torch.float32)
    x, weight, bias = randoms(13, 300), randoms(64, 300) / 300**0.5, randoms(64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        panels = kernels.pack(weight, dtype)
        product = F.linear(x.double(), weight.to(dtype).double(), bias.double())
        for rows in (4, 13):
            _compare("a product", kernels.multiply(x[:rows], panels, bias), product[:rows])
        _compare("a GELU", kernels.multiply(x, panels, bias, gelu=True), F.gelu(product))
        _compare_rows(partial(kernels.multiply, panels=panels, bias=bias), x)
    panels, scales = kernels.pack_int8(weight)
    rounded = (weight / scales[:, None]).round() * scales[:, None]
    product = F.linear(x.double(), rounded.double(), bias.double())
    _compare("a product in 8 bits", kernels.multiply_int8(x, panels, scales, bias), product)
    _compare_rows(partial(kernels.multiply_int8, panels=panels, weight_scales=scales, bias=bias), x)


def check_choice(kernels: ModuleType) -> None:
    """The same of `app.engine.cpu_kernels`' log-probabilities, the best of them, banned n-grams, and kept beams."""
    logits = _Randoms(torch.device("cpu"), torch.float32)(2, 4, 1024)
    logits[..., 1000:] = -torch.inf
    expected = logits.double().log_softmax(-1)
    scores = kernels.log_softmax(logits.clone())
    _compare("a log-softmax", scores, expected)
    best = expected.flatten(1).topk(8)
    found = kernels.top_candidates(scores, torch.zeros(2, 4), 8, 1000)
    _compare("the best candidates", found.scores, best.values)
    if not torch.equal(found.rows * 1024 + found.tokens, best.indices):
        raise ValueError("the best candidates are others than torch's")
    said, lengths, sizes = torch.tensor([[[1, 2, 3, 1, 2]] * 4] * 2), torch.tensor([5, 4]), torch.tensor([3, 2])
    banned = scores.clone()
    ban(banned, said, completes_ngram(said, lengths, said, lengths, sizes, 3))
    kernels.ban_ngrams(scores, said, lengths, sizes)
    if not torch.equal(scores[..., :-1], banned[..., :-1]):
        raise ValueError("n-grams are banned otherwise than by torch")
    ours, theirs = (_kept(keep, found) for keep in (kernels.keep, beam_search.keep))
    if not all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)):
        raise ValueError("beams are kept otherwise than by torch")


def check_draws(kernels: ModuleType) -> None:
    """The same of `app.engine.cpu_kernels`' draws: their noise is torch's, and the greatest is drawn."""
    scores = _Randoms(torch.device("cpu"), torch.float32)(2, 4, 1024)
    temperatures, floors = torch.tensor([0.7, 1.0]), torch.full((2, 4), 0.5)
    seeds, steps = torch.tensor([[1, 2], [2**32 - 1, 3]]), torch.tensor([1, 127])
    warm = scores / temperatures[:, None, None]
    left = warm.masked_fill(warm < floors[..., None], -torch.inf)
    ranked = left + gumbel_noise(seeds, steps, 4, 1024)
    tokens, logprobs = kernels.draw(scores, temperatures, floors, seeds, steps)
    expected = left.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    _compare("a draw's log-probability", logprobs, expected)
    if not torch.equal(tokens, ranked.argmax(-1)):
        raise ValueError("other tokens are drawn than by torch")
    raised = floors.clone()
    kernels.raise_floors(scores, temperatures, torch.tensor([0.4, 0.8]), raised, 1)
    best = left.double().sort(descending=True).values
    mass = best.softmax(-1).cumsum(-1)
    counts = [int((of_row < share).sum()) for share, rows in zip((0.4, 0.8), mass, strict=True) for of_row in rows]
    _compare("what top-p leaves", raised.flatten(), best.flatten(0, 1)[range(8), counts])
    _compare("noise", kernels.perturb(scores, temperatures, floors, seeds, steps), ranked.double())
    found = kernels.top_candidates(left, torch.zeros(2, 4), 8, 1024, ranked)
    if not torch.equal(found.rows * 1024 + found.tokens, ranked.flatten(1).topk(8).indices):
        raise ValueError("drawn candidates are others than torch's")


def _kept(keep: Callable[..., tuple[Tensor, Tensor]], candidates: Candidates) -> list[Tensor]:
    """All that counts of two sequences of four beams when the same candidates were kept in 18 steps."""
    options = SlotOptions.empty(2, 1, 20, torch.device("cpu"))
    options.max_new_tokens[:] = 19
    options.length_divisors[:] = torch.arange(20.0).clamp(min=1)  # no two of different lengths score the same
    state = beam_search.BeamState.empty(2, 4, 20, torch.device("cpu"))
    state.start(slice(0, 2), 0)
    said = [tensor for _ in range(18) for tensor in keep(state, candidates, options, int(candidates.tokens[0, 0]))]
    finished = {f.name: getattr(state, f.name) for f in fields(state) if f.name.startswith("finished")}
    rest = [getattr(state, f.name) for f in fields(state) if f.name not in finished]
    return said + rest + [held[state.is_finished] for held in finished.values()]  # what else stands there is chance


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Query [K, H*D] over keys and values [H, n, D], in fp64."""
    by_head = query.double().view(len(query), len(keys), -1).transpose(0, 1)
    attended: Tensor = (by_head @ keys.double().mT).softmax(-1) @ values.double()
    return attended.transpose(0, 1).flatten(1)


class _Randoms:
    """Normal numbers, the same in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.draw = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype, generator=self.draw)


def _compare(name: str, found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if found.dtype == torch.float32 else 2e-2
    if not torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance):
        raise ValueError(f"{name} in {found.dtype} gives another answer than torch")


def _compare_rows(multiply: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A row's product is the same to the last bit whatever rows stand beside it."""
    together = multiply(x)
    if not all(torch.equal(multiply(x[:rows]), together[:rows]) for rows in range(1, len(x))):
        raise ValueError("a product of some rows gives another answer than that of more")


def _synchronise(device: torch.device) -> None:
    """Wait until everything that was launched has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
