"""Products of few rows: each program fetches its weights, all of them at once, before the rows are there.

Of so few rows a product is as fast as its weights come. A program that holds a whole row of them waits for memory once,
and with overlapping launches (`launch.py`) it waits while the kernel before it still runs.

Shapes: R rows, P parts of the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.engine.triton_kernels.launch import begin, on, overlap

# Up to so many rows a product is bound by its weights; above, cuBLAS is better. 16 rows are what a tensor core takes at
# least; fp32, which has none that is exact, multiplies every row by itself.
MAX_ROWS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 8}
# In fp32 cuBLAS is better at larger weights, but for an activation, which is a kernel of its own there.
MAX_FP32_WEIGHTS = 2**20
# Inputs of a part: what a program holds of 16 outputs' weights in 16 bits.
PART = 1024


class Tile(NamedTuple):
    """How a product is cut: `python -m benchmarks.gpu_kernels` prints what each choice takes.

    Attributes:
        outputs: of a program; at least 16 on tensor cores.
        inputs: that it multiplies at a time.
        chains: of sums, side by side, that these inputs are; a tensor core adds to one sum after the other.
        warps: of a program.
        stages: tiles on their way at once, where there are several.
    """

    outputs: int
    inputs: int
    chains: int
    warps: int
    stages: int


# In 16 bits: of a layer's products, and of one with so many outputs that programs come in turns, an LM head.
OF_A_LAYER = Tile(16, 1024, 4, 4, 2)
MANY = 8192
OF_MANY = Tile(16, 256, 1, 2, 4)


def tile_for(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Tile:
    """The tile for a product, or for one part of it."""
    if dtype.itemsize == 4:  # by element: [outputs, rows, inputs] in registers
        return Tile(4, 1024 // triton.next_power_of_2(rows), 1, 4, 1)
    tile = OF_MANY if outputs >= MANY else OF_A_LAYER
    wide = min(max(triton.next_power_of_2(inputs), 16), tile.inputs)
    return tile._replace(inputs=wide, chains=min(tile.chains, wide // 16))


def takes(x: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether `linear` is for so many rows, and for so large weights."""
    few = x.numel() <= MAX_ROWS.get(x.dtype, 0) * x.shape[-1]
    return few and (x.dtype.itemsize == 2 or bool(activation) or weight.numel() <= MAX_FP32_WEIGHTS)


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str, tile: Tile | None = None) -> Tensor:
    """Few rows times the transposed weights, plus the bias, through an activation by BERT's name ("" is none).

    Args:
        x: [..., in], of no more rows than MAX_ROWS of its dtype.
        weight: [out, in], dense. It and the bias must not be what the kernel launched just before writes: they are
            read while that one runs.
        bias: [out].
        tile: None for `tile_for`'s.

    Returns:
        [..., out].
    """
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _launch(x, weight, bias, activation, out, 1, tile)
    return out


def linear_in_parts(x: Tensor, weight: Tensor, bias: Tensor, tile: Tile | None = None) -> Tensor:
    """The same without an activation, as sums over parts of the inputs, which are still to be added up.

    Each part has programs of its own.

    Returns:
        [P, ..., out], in fp32 if there are several.
    """
    parts = triton.cdiv(weight.shape[1], PART)
    dtype = x.dtype if parts == 1 else torch.float32
    out = x.new_empty(parts, *x.shape[:-1], weight.shape[0], dtype=dtype)
    _launch(x, weight, bias, "", out, parts, tile)
    return out


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, out: Tensor, parts: int, tile: Tile | None
) -> None:
    x = x.contiguous()
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    assert rows <= MAX_ROWS[x.dtype], f"{rows} rows: see `takes`"
    of_part = triton.cdiv(inputs, parts)
    tile = tile or tile_for(rows, outputs, of_part, x.dtype)
    on_tensor_cores = x.dtype.itemsize == 2
    with on(x):
        _linear[(triton.cdiv(outputs, tile.outputs), parts)](
            x,
            weight,
            bias,
            out,
            rows,
            outputs,
            PADDED=16 if on_tensor_cores else triton.next_power_of_2(rows),
            INPUTS=inputs,
            BLOCK_OUT=tile.outputs,
            CHAINS=tile.chains,
            CHAIN=tile.inputs // tile.chains,
            TILES=triton.cdiv(of_part, tile.inputs),
            DOT=on_tensor_cores,
            ACTIVATION=activation,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **overlap(x),
        )


@triton.jit
def _linear(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    PADDED: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CHAINS: tl.constexpr,
    CHAIN: tl.constexpr,
    TILES: tl.constexpr,
    DOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A few outputs of all rows, over one part of the inputs. Weights are a product's left side: they are many rows."""
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    part = tl.program_id(1)
    r = tl.arange(0, PADDED)
    i = tl.arange(0, CHAINS)[:, None, None] * CHAIN + tl.arange(0, CHAIN)[None, None, :]
    i += part * (TILES * CHAINS * CHAIN)
    weight_rows, weight_mask = weight + o.to(tl.int64)[None, :, None] * INPUTS, (o < outputs)[None, :, None]
    x_rows, x_mask = x + r[None, :, None] * INPUTS, (r < rows)[None, :, None]
    w = tl.load(weight_rows + i, mask=weight_mask & (i < INPUTS), other=0.0)
    b = tl.load(bias + o, mask=(o < outputs) & (part == 0), other=0.0).to(tl.float32)
    begin(PDL)
    read = tl.load(x_rows + i, mask=x_mask & (i < INPUTS), other=0.0)
    y = _product(w, read, DOT)
    for _ in range(1, TILES):
        i += CHAINS * CHAIN
        w = tl.load(weight_rows + i, mask=weight_mask & (i < INPUTS), other=0.0)
        read = tl.load(x_rows + i, mask=x_mask & (i < INPUTS), other=0.0)
        y += _product(w, read, DOT)
    y += b[:, None]
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_new":  # its tanh, written as what there is: 1 - 2 / (exp(2 u) + 1)
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    to = out + (part * rows + r[None, :]) * outputs + o[:, None]
    tl.store(to, y.to(out.dtype.element_ty), mask=(r[None, :] < rows) & (o[:, None] < outputs))


@triton.jit
def _product(w, read, DOT: tl.constexpr):
    """Weights [CHAINS, BLOCK_OUT, CHAIN] and rows [CHAINS, PADDED, CHAIN] -> [BLOCK_OUT, PADDED]."""
    if DOT:
        sums = tl.dot(w, tl.permute(read, (0, 2, 1)))
    else:
        sums = tl.sum(w.to(tl.float32)[:, :, None, :] * read.to(tl.float32)[:, None, :, :], 3)
    return tl.sum(sums, 0)
