"""The compiled code, and the addresses that it gets: of tensors whose shapes, dtypes and layouts have been looked at.

Does not know what the functions compute.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from app.engine.top_candidates import BLOCK

# As in C. The version is of the functions' arguments.
_VERSION, LANES, WIDE, MOST_KEYS = 2, 8, 16, 4096
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "multiply": [_POINTER] * 5 + [_SIZE] * 3 + [_INT, _FLOAT, _SIZE, _INT, _INT],
    "multiply_int8": [_POINTER] * 8 + [_SIZE] * 3 + [_FLOAT, _INT, _INT],
    "cross_attention": [_POINTER] * 5 + [_SIZE] * 5 + [_INT],
    "self_attention": [_POINTER] * 6 + [_SIZE] * 6 + [_INT],
    "source_attention": [_POINTER] * 4 + [_SIZE] * 4 + [_INT],
    "source_attention_room": [_SIZE] * 2,
    "log_softmax": [_POINTER] + [_SIZE] * 2 + [_INT],
    "ban_ngrams": [_POINTER] * 4 + [_SIZE] * 5,
    "top_candidates": [_POINTER] * 7 + [_SIZE] * 5 + [_INT],
    "keep": [_POINTER] * 4 + [_INT],
}


class MissingKernelsError(ImportError):
    """The processor lacks what the code needs, gcc was missing when it was installed, or it is of another version."""


@cache
def library() -> ctypes.CDLL:
    """The compiled code; torch is loaded already, and so the OpenMP that both use."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise MissingKernelsError("app/engine/cpu_kernels needs an x86 processor with AVX2")
    spec = find_spec(f"{__package__}._compiled")
    if spec is None or spec.origin is None:
        raise MissingKernelsError("app/engine/cpu_kernels is not compiled: install gcc, and then this package again")
    code = ctypes.CDLL(spec.origin)
    constants = (ctypes.c_int64 * 5).in_dll(code, "precis_constants")
    if tuple(constants) != (_VERSION, LANES, WIDE, MOST_KEYS, BLOCK):
        raise MissingKernelsError(
            "app/engine/cpu_kernels was compiled from another version: install this package again"
        )
    for name, arguments in _ARGUMENTS.items():
        function = getattr(code, name)
        function.argtypes, function.restype = arguments, _SIZE if name == "source_attention_room" else None
    return code


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError: it is not of the shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}; {list(shape)} fits the rest")


def address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor lies that C may read and write while the caller holds it; raises ValueError."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{tensor.dtype}, strides {tensor.stride()}, on {tensor.device}: not {dtype} as it lies in C")
    return tensor.data_ptr()
