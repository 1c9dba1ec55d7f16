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
    """The kernels, once one of them has run: Triton needs a C compiler, Python's headers, and a GPU that it knows."""
    try:
        kernels = importlib.import_module("app.engine.triton_kernels")
        row = torch.ones(1, 16, device=device)
        kernels.add_norm(row, row, row[0], row[0], 1e-12)
    except Exception as error:
        logger.warning("a decode step is made of torch's operations alone: %s", error)
        return None
    return kernels
