"""What an engine spends its time on, on a CPU in fp32 and int8, in C: products, and attention.

The C files say how, and why that is faster than a library's; `python -m benchmarks.kernels` prints by how much. gcc
compiles them when the package is installed. Here their addresses and sizes come from tensors, and are checked. Of a
step's attention it has what `app.engine.triton_kernels` has; products and attention serve an encoder as well. Does not
know networks or requests, nor where it is faster: see `app/engine/kernels.py`.

Shapes: S sequences, K beams, H heads, D head size, E = H * D, C slots, T target and N source positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as ListLike
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

# As in C. The version is of the functions' arguments.
_VERSION, _LANES, _WIDE, _MOST_KEYS = 2, 8, 16, 4096
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "multiply": [_POINTER] * 5 + [_SIZE] * 3 + [_INT, _FLOAT, _SIZE, _INT, _INT],
    "multiply_int8": [_POINTER] * 8 + [_SIZE] * 3 + [_FLOAT, _INT, _INT],
    "cross_attention": [_POINTER] * 5 + [_SIZE] * 5 + [_INT],
    "self_attention": [_POINTER] * 6 + [_SIZE] * 6 + [_INT],
    "source_attention": [_POINTER] * 4 + [_SIZE] * 4 + [_INT],
    "source_attention_room": [_SIZE] * 2,
}


class MissingKernelsError(ImportError):
    """The processor lacks what the code needs, gcc was missing when it was installed, or it is of another version."""


@cache
def _library() -> ctypes.CDLL:
    """The compiled code; torch is loaded already, and so the OpenMP that both use."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise MissingKernelsError("app/engine/cpu_kernels needs an x86 processor with AVX2")
    spec = find_spec(f"{__name__}._compiled")
    if spec is None or spec.origin is None:
        raise MissingKernelsError("app/engine/cpu_kernels is not compiled: install gcc, and then this package again")
    library = ctypes.CDLL(spec.origin)
    constants = (ctypes.c_int64 * 4).in_dll(library, "precis_constants")
    if tuple(constants) != (_VERSION, _LANES, _WIDE, _MOST_KEYS):
        raise MissingKernelsError(
            "app/engine/cpu_kernels was compiled from another version: install this package again"
        )
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _SIZE if name == "source_attention_room" else None
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

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; so do all functions here.
    """
    inputs, outputs = panels.shape[1], panels.shape[0] * _WIDE
    _check("panels", panels, (outputs // _WIDE, inputs, _WIDE))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    product = _product(x, inputs, outputs, bias, residual)
    half = panels.dtype == torch.float16
    _library().multiply(
        _address(x),
        _address(panels, torch.float16 if half else torch.float32),
        _address(bias),
        None if residual is None else _address(residual),
        _address(product),
        product.numel() // outputs,
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
    """Weight [out, in] -> panels [out / 16, in / 2, 16, 2] int8 for `multiply_int8`, and their scales [out] fp32.

    Outputs are filled up to a multiple of 16, inputs to one of 2.
    """
    filled = F.pad(weight, (0, weight.shape[1] % 2, 0, -len(weight) % _WIDE))
    scales = (filled.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (filled / scales[:, None]).round().to(torch.int8)
    return rounded.view(-1, _WIDE, filled.shape[1] // 2, 2).transpose(1, 2).contiguous(), scales


def multiply_int8(
    x: Tensor,
    panels: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """`multiply` with weights of 8 bits; inputs are rounded, a row's on one scale.

    Args:
        x: [..., in] fp32; `in` is even.
        panels: [P, in / 2, 16, 2], of `pack_int8`.
        weight_scales: [16 * P] fp32, of `pack_int8`.
        bias: [16 * P] fp32, filled up as the panels are.
        residual: [..., 16 * P] fp32, added last.
        gelu: whether an exact GELU comes before the residual.

    Returns:
        [..., 16 * P] fp32.
    """
    inputs, outputs = 2 * panels.shape[1], panels.shape[0] * _WIDE
    _check("panels", panels, (outputs // _WIDE, inputs // 2, _WIDE, 2))
    _check("weight_scales", weight_scales, (outputs,))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    product = _product(x, inputs, outputs, bias, residual)
    rows = product.numel() // outputs
    rounded, row_scales = torch.empty(rows, inputs, dtype=torch.int16), torch.empty(rows, dtype=torch.float32)  # room
    _library().multiply_int8(
        _address(x),
        _address(panels, torch.int8),
        _address(weight_scales),
        _address(bias),
        None if residual is None else _address(residual),
        _address(product),
        _address(rounded, torch.int16),
        _address(row_scales),
        rows,
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


def source_attention(qkv: Tensor, lengths: ListLike[int]) -> Tensor:
    """All tokens of each source over those of the same source, whatever sources stand beside it.

    Args:
        qkv: [P, 3, H, D] fp32, sources one behind the other, queries scaled already; D of a size that `fits`.
        lengths: of each source; their sum is P.

    Returns:
        [P, E].
    """
    tokens, _, heads, head_size = qkv.shape
    _check("qkv", qkv, (sum(lengths), 3, heads, head_size))
    _check_heads(head_size, len(lengths), len(lengths))
    if min(lengths, default=0) < 0:
        raise ValueError(f"sources of {list(lengths)} tokens")
    qkv, counts, threads = qkv.contiguous(), torch.tensor(lengths, dtype=torch.int64), torch.get_num_threads()
    longest = max(lengths, default=0)
    room = torch.empty(threads, _library().source_attention_room(longest, head_size), dtype=torch.float32)
    attended = torch.empty(tokens, heads * head_size, dtype=torch.float32)
    _library().source_attention(
        _address(qkv),
        _address(counts, torch.int64),
        _address(attended),
        _address(room),
        len(lengths),
        heads,
        head_size,
        longest,
        threads,
    )
    return attended


def self_attention(qkv: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, positions: Tensor) -> Tensor:
    """Write each beam's newest key and value to the cache, and let it attend to its own history, they included.

    Args:
        qkv: [S*K, 3*E] fp32, queries scaled already.
        keys: [C, H, T, K, D] fp32, dense; written at `positions`.
        values: the same.
        ancestors: [C, K, T or more] int64, dense: which beam wrote position t of a beam's history; written at
            `positions`.
        positions: [S] int64, less than T and than what `fits`.

    Returns:
        [S*K, E].
    """
    size, (slots, heads, target, beams, head_size) = len(positions), keys.shape
    width = heads * head_size
    _check("qkv", qkv, (size * beams, 3 * width))
    _check("values", values, keys.shape)
    _check("ancestors", ancestors, (slots, beams, max(ancestors.shape[2], target)))
    _check_heads(head_size, size, slots)
    qkv = qkv.contiguous()
    attended = torch.empty(size * beams, width, dtype=torch.float32)
    _library().self_attention(
        _address(qkv),
        _address(keys),
        _address(values),
        _address(ancestors, torch.int64),
        _address(positions, torch.int64),
        _address(attended),
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
        lengths: [S] int64, of the sources, at most N and what `fits`.

    Returns:
        [S*K, E].
    """
    size, (slots, heads, source, head_size) = len(lengths), keys.shape
    beams = len(query) // max(size, 1)
    _check("query", query, (size * beams, heads * head_size))
    _check("values", values, keys.shape)
    _check_heads(head_size, size, slots)
    query = query.contiguous()
    attended = torch.empty(query.shape, dtype=torch.float32)
    _library().cross_attention(
        _address(query),
        _address(keys),
        _address(values),
        _address(lengths, torch.int64),
        _address(attended),
        size,
        beams,
        heads,
        head_size,
        source,
        torch.get_num_threads(),
    )
    return attended


def _product(x: Tensor, inputs: int, outputs: int, bias: Tensor, residual: Tensor | None) -> Tensor:
    """Room for the product of x, which fits, as bias and residual do."""
    _check("x", x, (*x.shape[:-1], inputs))
    _check("bias", bias, (outputs,))
    shape = (*x.shape[:-1], outputs)
    if residual is not None:
        _check("residual", residual, shape)
    return torch.empty(shape, dtype=torch.float32)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}; {list(shape)} fits the rest")


def _check_heads(head_size: int, size: int, slots: int) -> None:
    if head_size % _LANES or size > slots:
        raise ValueError(
            f"heads of {head_size}, {size} sequences: heads of a multiple of {_LANES}, at most {slots} fit"
        )


def _address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor lies that C may read while the caller holds it."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{tensor.dtype}, strides {tensor.stride()}, on {tensor.device}: not {dtype} as it lies in C")
    return tensor.data_ptr()
