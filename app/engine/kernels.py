"""Whether a device has kernels of ours: asked once, where something is built that could use them.

Does not know what they compute.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)


def kernels_for(device: torch.device) -> ModuleType | None:
    """`app.engine.triton_kernels` on CUDA where Triton is installed (CUDA builds of torch bring it), else None."""
    if device.type != "cuda":
        return None
    try:
        return importlib.import_module("app.engine.triton_kernels")
    except ImportError as error:
        logger.warning("a decode step is made of torch's operations alone: %s", error)
        return None
