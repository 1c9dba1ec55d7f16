"""Whether a device has kernels of ours: asked where something is built that could use them, and found out once.

Does not know what they compute.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

logger = logging.getLogger(__name__)


def kernels_for(device: torch.device) -> ModuleType | None:
    """`app.engine.triton_kernels` on CUDA where Triton works (CUDA builds of torch bring it), else None."""
    return _working(device) if device.type == "cuda" else None


@cache
def _working(device: torch.device) -> ModuleType | None:
    """The kernels, once those that ask most of a GPU have run: Triton needs a C compiler and Python's headers, too."""
    try:
        kernels = importlib.import_module("app.engine.triton_kernels")
        for dtype in (torch.float32, torch.float16):
            row, weight = torch.ones(1, 64, device=device, dtype=dtype), torch.ones(64, 64, device=device, dtype=dtype)
            kernels.linear(row, weight, weight[0], "gelu")
            keys = torch.ones(1, 1, 128, 64, device=device, dtype=dtype)
            kernels.cross_attention(row, keys, keys, torch.ones(1, device=device, dtype=torch.int64))
    except Exception as error:
        logger.warning("a decode step is made of torch's operations alone: %s", error)
        return None
    return kernels
