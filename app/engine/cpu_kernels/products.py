"""Products with packed weights: see `products.c` and `int8_products.c`. Does not know networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.cpu_kernels.compiled import FORMATS, address, check_shape, format_of, library


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight [out, in] -> panels [out / W, in, W] for `multiply`, in 32 or 16 bits; zeros fill the last one up.

    W is 16, or 32 with AVX-512.
    """
    wide = library().wide
    filled = F.pad(weight, (0, 0, 0, -len(weight) % wide))
    return filled.to(dtype).view(-1, wide, weight.shape[1]).transpose(1, 2).contiguous()


def multiply(
    x: Tensor,
    panels: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    scale: float = 1.0,
    scaled: int = 0,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """A product with packed weights and what follows it; a row's result does not depend on the rows beside it.

    Args:
        x: [..., in] fp32.
        panels: [P, in, W], of `pack`.
        bias: [W * P] fp32, filled up as the panels are.
        residual: [..., W * P] fp32, added last.
        scale: what the first `scaled` outputs are multiplied by, their biases included.
        scaled: see `scale`.
        gelu: whether an exact GELU comes before the residual.
        out: [..., W * P] fp32, where the result is written; it shares no memory with x or the residual.

    Returns:
        [..., W * P] fp32: `out`, where it is given.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; so do all functions here.
    """
    count, inputs, wide = panels.shape
    outputs = count * wide
    check_shape("panels", panels, (count, inputs, library().wide))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    product = _product(x, inputs, outputs, bias, residual, out)
    library().code.multiply(
        address(x),
        address(panels, panels.dtype),
        address(bias),
        None if residual is None else address(residual),
        address(product),
        product.numel() // outputs,
        inputs,
        outputs,
        format_of("panels", panels, tuple(FORMATS)),
        scale,
        scaled,
        gelu,
        torch.get_num_threads(),
    )
    return product


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> panels [out / W, in / 2, W, 2] int8 for `multiply_int8`, and their scales [out] fp32.

    Outputs are filled up to a multiple of W, inputs to one of 2.
    """
    wide = library().wide
    filled = F.pad(weight, (0, weight.shape[1] % 2, 0, -len(weight) % wide))
    scales = (filled.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (filled / scales[:, None]).round().to(torch.int8)
    return rounded.view(-1, wide, filled.shape[1] // 2, 2).transpose(1, 2).contiguous(), scales


def multiply_int8(
    x: Tensor,
    panels: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`multiply` with weights of 8 bits; inputs are rounded, a row's on one scale.

    Args:
        x: [..., in] fp32; `in` is even.
        panels: [P, in / 2, W, 2], of `pack_int8`.
        weight_scales: [W * P] fp32, of `pack_int8`.
        bias: [W * P] fp32, filled up as the panels are.
        residual: [..., W * P] fp32, added last.
        gelu: whether an exact GELU comes before the residual.
        out: as of `multiply`.

    Returns:
        [..., W * P] fp32.
    """
    count, pairs, wide, _ = panels.shape
    inputs, outputs = 2 * pairs, count * wide
    check_shape("panels", panels, (count, pairs, library().wide, 2))
    check_shape("weight_scales", weight_scales, (outputs,))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    product = _product(x, inputs, outputs, bias, residual, out)
    rows = product.numel() // outputs
    rounded, row_scales = torch.empty(rows, inputs, dtype=torch.int16), torch.empty(rows, dtype=torch.float32)  # room
    library().code.multiply_int8(
        address(x),
        address(panels, torch.int8),
        address(weight_scales),
        address(bias),
        None if residual is None else address(residual),
        address(product),
        address(rounded, torch.int16),
        address(row_scales),
        rows,
        inputs,
        outputs,
        min((2**31 - 1) // (128 * inputs), 2**15 - 1),
        gelu,
        torch.get_num_threads(),
    )
    return product


def _product(x: Tensor, inputs: int, outputs: int, bias: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
    """Room for the product of x, which fits, as bias and residual do: `out`, or new memory."""
    check_shape("x", x, (*x.shape[:-1], inputs))
    check_shape("bias", bias, (outputs,))
    shape = (*x.shape[:-1], outputs)
    if residual is not None:
        check_shape("residual", residual, shape)
    if out is None:
        return torch.empty(shape, dtype=torch.float32)
    check_shape("out", out, shape)
    if out.numel() and any(
        out.untyped_storage().data_ptr() == read.untyped_storage().data_ptr()
        for read in (x, residual)
        if read is not None
    ):
        raise ValueError("out shares memory with what is read while it is written")
    return out
