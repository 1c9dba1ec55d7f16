"""The compiled code, and the addresses that it gets: of tensors whose shapes, dtypes and layouts have been looked at.

Does not know what the functions compute.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from app.engine.top_candidates import BLOCK

# As in C. The version is of the functions' arguments.
_VERSION, MOST_KEYS = 5, 4096
_BUILT_LANES = {"_avx2": 8, "_avx512": 16}
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "multiply": [_POINTER] * 5 + [_SIZE] * 3 + [_INT, _FLOAT, _SIZE, _INT, _INT],
    "multiply_int8": [_POINTER] * 8 + [_SIZE] * 3 + [_FLOAT, _INT, _INT],
    "cross_attention": [_POINTER] * 5 + [_SIZE] * 5 + [_INT] * 2,
    "self_attention": [_POINTER] * 6 + [_SIZE] * 6 + [_INT] * 2,
    "source_attention": [_POINTER] * 4 + [_SIZE] * 4 + [_INT],
    "source_attention_room": [_SIZE] * 2,
    "log_softmax": [_POINTER] + [_SIZE] * 2 + [_INT],
    "ban_ngrams": [_POINTER] * 4 + [_SIZE] * 5,
    "top_candidates": [_POINTER] * 8 + [_SIZE] * 5 + [_INT],
    "keep": [_POINTER] * 4 + [_INT],
    "raise_floors": [_POINTER] * 5 + [_SIZE] * 4 + [_INT],
    "perturb": [_POINTER] * 6 + [_SIZE] * 3 + [_INT],
    "draw": [_POINTER] * 7 + [_SIZE] * 3 + [_INT],
}


class MissingKernelsError(ImportError):
    """The processor lacks what the code needs, gcc was missing when it was installed, or it is of another version."""


@dataclass(frozen=True)
class Library:
    """The code that was compiled for processors like this one.

    Attributes:
        code: its functions.
        lanes: numbers of fp32 in a vector.
        wide: outputs of a panel of weights.
    """

    code: ctypes.CDLL
    lanes: int
    wide: int


def build() -> str | None:
    """The name of what this processor can run: None, but on x86 with AVX2 or, better, with AVX-512 and its VNNI."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return "_avx512"
    return "_avx2" if capability in ("AVX2", "AVX512") else None


@cache
def library() -> Library:
    """The compiled code; torch is loaded already, and so the OpenMP that both use."""
    name = build()
    if name is None:
        raise MissingKernelsError("app/engine/cpu_kernels needs an x86 processor with AVX2")
    spec = find_spec(f"{__package__}.{name}")
    if spec is None or spec.origin is None:
        raise MissingKernelsError("app/engine/cpu_kernels is not compiled: install gcc, and then this package again")
    code = ctypes.CDLL(spec.origin)
    version, lanes, wide, most_keys, columns = (ctypes.c_int64 * 5).in_dll(code, "precis_constants")
    if (version, lanes, most_keys, columns) != (_VERSION, _BUILT_LANES[name], MOST_KEYS, BLOCK):
        raise MissingKernelsError(
            "app/engine/cpu_kernels was compiled from another version: install this package again"
        )
    for function, arguments in _ARGUMENTS.items():
        of_code = getattr(code, function)
        of_code.argtypes, of_code.restype = arguments, _SIZE if function.endswith("_room") else None
    return Library(code, lanes, wide)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError: it is not of the shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}; {list(shape)} fits the rest")


def address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor lies that C may read and write while the caller holds it; raises ValueError."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{tensor.dtype}, strides {tensor.stride()}, on {tensor.device}: not {dtype} as it lies in C")
    return tensor.data_ptr()


def format_of(name: str, tensor: Tensor, formats: tuple[torch.dtype, ...]) -> int:
    """What C calls a tensor's dtype; raises ValueError: it is none of those."""
    if tensor.dtype not in formats:
        raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, formats))}")
    return FORMATS[tensor.dtype]
