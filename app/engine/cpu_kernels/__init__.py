"""What a decode step spends its time on, on a CPU in fp32, in C: products of few rows, and attention.

`products.c` and `attention.c` say how, and why that is faster than a library's; `python -m benchmarks.kernels` prints
by how much. They are compiled when the package is installed, if there is a C compiler. Here their addresses and sizes
come from tensors. Of attention it has what `app.engine.triton_kernels` has. Does not know networks or requests.

Shapes: S sequences, K beams, H heads, D head size, E = H * D, C slots, T target and N source positions.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

_LANES, _MOST_KEYS, _WIDE = 8, 4096, 16  # as in C
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class MissingKernelsError(ImportError):
    """There was no C compiler when this package was installed, or this processor has not what the code needs."""


@cache
def _library() -> ctypes.CDLL:
    """The compiled code; torch is loaded already, and so the OpenMP that both use."""
    spec = find_spec(f"{__name__}._compiled")
    if spec is None or spec.origin is None:
        raise MissingKernelsError(
            "app/engine/cpu_kernels is not compiled: install the package where there is a C compiler"
        )
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise MissingKernelsError("app/engine/cpu_kernels needs an x86 processor with AVX2")
    library = ctypes.CDLL(spec.origin)
    library.multiply.argtypes = [_POINTER] * 5 + [_SIZE] * 3 + [_INT, _FLOAT, _SIZE, _INT, _INT]
    library.multiply_int8.argtypes = [_POINTER] * 8 + [_SIZE] * 3 + [_FLOAT, _INT, _INT]
    library.cross_attention.argtypes = [_POINTER] * 5 + [_SIZE] * 5 + [_INT]
    library.self_attention.argtypes = [_POINTER] * 6 + [_SIZE] * 6 + [_INT]
    for name in ("multiply", "multiply_int8", "cross_attention", "self_attention"):
        getattr(library, name).restype = None
    return library


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight [out, in] -> panels [out / 16, in, 16] for `multiply`, fp32 or fp16; zeros fill the last one up."""
    filled = F.pad(weight, (0, 0, 0, -len(weight) % _WIDE))
    return filled.to(dtype).view(-1, _WIDE, weight.shape[1]).transpose(1, 2).contiguous()


def multiply(
    x: Tensor,
    panels: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    scale: float = 1.0,
    scaled: int = 0,
    gelu: bool = False,
) -> Tensor:
    """A product with packed weights and what follows it; a row's result does not depend on the rows beside it.

    Args:
        x: [..., in] fp32.
        panels: [P, in, 16], of `pack`.
        bias: [16 * P] fp32, filled up as the panels are.
        residual: [..., 16 * P] fp32, added last.
        scale: what the first `scaled` outputs are multiplied by, their biases included.
        scaled: see `scale`.
        gelu: whether an exact GELU comes before the residual.

    Returns:
        [..., 16 * P] fp32.
    """
    x = x.contiguous()
    inputs, outputs = panels.shape[1], panels.shape[0] * _WIDE
    if x.shape[-1] != inputs or len(bias) != outputs:
        raise ValueError(f"x {list(x.shape)} and bias {list(bias.shape)} do not fit weights [{outputs}, {inputs}]")
    product = x.new_empty(*x.shape[:-1], outputs)
    if residual is not None and residual.shape != product.shape:
        raise ValueError(f"residual {list(residual.shape)} does not fit a product {list(product.shape)}")
    half = panels.dtype == torch.float16
    _library().multiply(
        _address(x, torch.float32),
        _address(panels, torch.float16 if half else torch.float32),
        _address(bias, torch.float32),
        None if residual is None else _address(residual.contiguous(), torch.float32),
        product.data_ptr(),
        x.numel() // inputs,
        inputs,
        outputs,
        half,
        scale,
        scaled,
        gelu,
        torch.get_num_threads(),
    )
    return product


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> panels [out / 16, in / 2, 16, 2] int8 for `multiply_int8`, and what a number is worth, [out].

    Outputs are filled up to a multiple of 16, inputs to one of 2.
    """
    filled = F.pad(weight, (0, weight.shape[1] % 2, 0, -len(weight) % _WIDE))
    worth = (filled.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (filled / worth[:, None]).round().to(torch.int8)
    return rounded.view(-1, _WIDE, filled.shape[1] // 2, 2).transpose(1, 2).contiguous(), worth


def multiply_int8(
    x: Tensor, panels: Tensor, worth: Tensor, bias: Tensor, residual: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """`multiply` with weights of 8 bits; inputs are rounded, a row's on one scale.

    Args:
        x: [..., in] fp32.
        panels: [P, in / 2, 16, 2], of `pack_int8`.
        worth: [16 * P] fp32, of `pack_int8`.
        bias: [16 * P] fp32, filled up as the panels are.
        residual: [..., 16 * P] fp32, added last.
        gelu: whether an exact GELU comes before the residual.

    Returns:
        [..., 16 * P] fp32.
    """
    inputs, outputs = 2 * panels.shape[1], panels.shape[0] * _WIDE
    x = (F.pad(x, (0, 1)) if x.shape[-1] == inputs - 1 else x).contiguous()
    if x.shape[-1] != inputs or len(bias) != outputs or len(worth) != outputs:
        raise ValueError(f"x {list(x.shape)} and bias {list(bias.shape)} do not fit weights [{outputs}, {inputs}]")
    product = x.new_empty(*x.shape[:-1], outputs)
    if residual is not None and residual.shape != product.shape:
        raise ValueError(f"residual {list(residual.shape)} does not fit a product {list(product.shape)}")
    rounded, scales = torch.empty(x.shape, dtype=torch.int16), torch.empty(x.shape[:-1])  # room
    _library().multiply_int8(
        _address(x, torch.float32),
        _address(panels, torch.int8),
        _address(worth, torch.float32),
        _address(bias, torch.float32),
        None if residual is None else _address(residual.contiguous(), torch.float32),
        product.data_ptr(),
        rounded.data_ptr(),
        scales.data_ptr(),
        x.numel() // inputs,
        inputs,
        outputs,
        min((2**31 - 1) // (128 * inputs), 2**15 - 1),
        gelu,
        torch.get_num_threads(),
    )
    return product


def fits(head_size: int, keys: int) -> bool:
    """Whether attention over so many keys of this size is computed here."""
    return head_size % _LANES == 0 and keys <= _MOST_KEYS


def self_attention(qkv: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, positions: Tensor) -> Tensor:
    """Write each beam's newest key and value to the cache, and let it attend to its own history, they included.

    Args:
        qkv: [S*K, 3*E] fp32, queries scaled already.
        keys: [C, H, T, K, D] fp32, dense; written at `positions`.
        values: the same.
        ancestors: [C, K, T] int64, dense: which beam wrote position t of a beam's history; written at `positions`.
        positions: [S] int64, less than T.

    Returns:
        [S*K, E].
    """
    size, (_, heads, target, beams, head_size) = len(positions), keys.shape
    qkv = qkv.contiguous()
    attended = qkv.new_empty(size * beams, heads * head_size)
    _library().self_attention(
        _address(qkv, torch.float32),
        _address(keys, torch.float32),
        _address(values, torch.float32),
        _address(ancestors, torch.int64),
        _address(positions, torch.int64),
        attended.data_ptr(),
        size,
        beams,
        heads,
        head_size,
        target,
        ancestors.shape[2],
        torch.get_num_threads(),
    )
    return attended


def cross_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Each beam over its sequence's source.

    Args:
        query: [S*K, E] fp32, scaled already.
        keys: [C, H, N, D] fp32, dense.
        values: the same.
        lengths: [S] int64, of the sources, at most N.

    Returns:
        [S*K, E].
    """
    size, (_, heads, source, head_size) = len(lengths), keys.shape
    query = query.contiguous()
    attended = torch.empty_like(query)
    _library().cross_attention(
        _address(query, torch.float32),
        _address(keys, torch.float32),
        _address(values, torch.float32),
        _address(lengths, torch.int64),
        attended.data_ptr(),
        size,
        len(query) // size,
        heads,
        head_size,
        source,
        torch.get_num_threads(),
    )
    return attended


def _address(tensor: Tensor, dtype: torch.dtype) -> int:
    """Where a tensor lies that C may read; raises ValueError where it would find something else."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{tensor.dtype}, strides {tensor.stride()}, on {tensor.device}: not {dtype} as it lies in C")
    return tensor.data_ptr()
