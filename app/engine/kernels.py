"""Whether a device has kernels of ours: asked where something is built that could use them, and found out once.

Found out by running them beside torch: a GPU on which they do not compile, do not fit, or give other answers has none.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)


def kernels_for(device: torch.device) -> ModuleType | None:
    """`app.engine.triton_kernels` on CUDA where Triton works (CUDA builds of torch bring it), else None."""
    return _working(device) if device.type == "cuda" else None


@cache
def _working(device: torch.device) -> ModuleType | None:
    """The kernels, once they have given torch's answers: Triton needs a C compiler and Python's headers, too."""
    try:
        kernels = importlib.import_module("app.engine.triton_kernels")
        for dtype in (torch.float32, torch.float16):
            check(kernels, device, dtype)
    except Exception as error:
        logger.warning("a decode step is made of torch's operations alone: %s", error)
        return None
    return kernels


def check(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Run those that ask most of a GPU, in the shapes that do, beside torch in fp64.

    Raises:
        ValueError: one gives another answer; what it raises itself where it cannot be compiled or run.
    """
    draw = torch.Generator(device).manual_seed(0)

    def randoms(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=draw)

    def compare(name: str, found: Tensor, expected: Tensor) -> None:
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        if not torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance):
            raise ValueError(f"{name} in {dtype} gives another answer than torch")

    bias = randoms(8192)
    for outputs, inputs in ((48, 1024), (48, 1536), (8192, 512)):  # of a layer, in two tiles, of an LM head
        x, weight = randoms(4, inputs), randoms(outputs, inputs) / inputs**0.5
        if not kernels.takes(x, weight, ""):
            continue
        product = F.linear(x.double(), weight.double(), bias[:outputs].double())
        _synchronise(device)  # weights are read before the kernel ahead has ended
        compare("a product", kernels.linear(x, weight, bias[:outputs], ""), product)
    x, weight, residual = randoms(4, 3072), randoms(48, 3072) / 3072**0.5, randoms(4, 48)
    total = F.linear(x.double(), weight.double(), bias[:48].double()) + residual.double()
    _synchronise(device)
    parts = kernels.linear_in_parts(x, weight, bias[:48])
    ones, zeros = torch.ones_like(bias[:48]), torch.zeros_like(bias[:48])
    compare("a norm", kernels.add_norm(parts, residual, ones, zeros, 1e-5), F.layer_norm(total, (48,)))
    query, keys, values = randoms(4, 128) / 8, randoms(1, 2, 512, 64), randoms(1, 2, 512, 64)
    lengths = torch.full((1,), 300, device=device)
    by_head = query.double().view(4, 2, 64).transpose(0, 1)
    weights = (by_head @ keys[0, :, :300].double().mT).softmax(-1)
    attended = (weights @ values[0, :, :300].double()).transpose(0, 1).flatten(1)
    compare("attention", kernels.cross_attention(query, keys, values, lengths), attended)
    logits = randoms(1, 4, 8192)
    compare("a log-softmax", kernels.log_softmax(logits), logits.double().log_softmax(-1))


def _synchronise(device: torch.device) -> None:
    """Wait until everything that was launched has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
