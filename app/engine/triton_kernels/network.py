"""Of the network: attention of a step, residual and norm, products of few rows.

Shapes: S sequences, K beams, H heads, D head size (a power of two), E = H * D, C slots of a cache, T target and N
source positions that it has room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.engine.triton_kernels.launch import on

# Elements of a tile of keys: what four warps hold in registers beside its values.
TILE = 4096
# Up to so many rows `linear` reads the weights once and is bound by that; above, cuBLAS is better. 16 rows are what a
# tensor core takes at least; fp32, which has none that is exact, multiplies every row by itself.
MAX_ROWS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 8}
# On an H200 cuBLAS reads larger weights faster than it does (`python -m benchmarks.gpu_kernels`).
MAX_WEIGHTS = 2**20


def fits(head_size: int) -> bool:
    """Whether attention over heads of this size is computed here."""
    return head_size in (16, 32, 64, 128)


def self_attention(qkv: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, positions: Tensor) -> Tensor:
    """Write each beam's newest key and value to the cache, and let it attend to its own history, they included.

    Args:
        qkv: [S*K, 3*E], queries scaled already.
        keys: [C, H, T, K, D], dense; written at `positions`.
        values: the same.
        ancestors: [C, K, T] int64, dense: which beam wrote position t of a beam's history; written at `positions`.
        positions: [S] int64.

    Returns:
        [S*K, E].
    """
    _, heads, room, beams, head_size = keys.shape
    rows = qkv.shape[0]
    out = qkv.new_empty(rows, heads * head_size)
    with on(qkv):
        _self_attention[(rows, heads)](
            qkv.contiguous(),
            keys,
            values,
            ancestors,
            positions,
            out,
            H=heads,
            T=room,
            T_TABLE=ancestors.shape[2],
            K=beams,
            D=head_size,
            BLOCK=TILE // head_size,
        )
    return out


def cross_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """All beams of a sequence over the keys and values of its source, up to its length.

    A sequence's head is one program: with one sequence there are only H, each of which reads its keys and values with
    the next tile on its way.

    Args:
        query: [S*K, E], scaled already.
        keys: [C, H, N, D], dense.
        values: the same.
        lengths: [S] int64, at least 1.

    Returns:
        [S*K, E].
    """
    _, heads, room, head_size = keys.shape
    size = lengths.shape[0]
    beams = query.shape[0] // size
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    with on(query):
        _cross_attention[(size, heads)](
            query.contiguous(),
            keys,
            values,
            lengths,
            out,
            H=heads,
            N=room,
            K=beams,
            ROWS=max(16, triton.next_power_of_2(beams)),  # what a tensor core takes at least
            D=head_size,
            BLOCK=TILE // head_size,
            num_stages=3 if query.dtype.itemsize == 2 else 2,
        )
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x + residual, both [..., E]."""
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    with on(x):
        _add_norm[(x.numel() // width,)](
            x, residual, weight, bias, out, eps, WIDTH=width, BLOCK=block, num_warps=4 if block <= 1024 else 8
        )
    return out


def takes(x: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether `linear` is for so many rows, and weights that are few or have an activation, which it saves a kernel."""
    return x.numel() <= MAX_ROWS.get(x.dtype, 0) * x.shape[-1] and (bool(activation) or weight.numel() <= MAX_WEIGHTS)


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Few rows times the transposed weights, plus the bias, through an activation by BERT's name ("" is none).

    Args:
        x: [..., in], of no more rows than MAX_ROWS of its dtype.
        weight: [out, in], dense.
        bias: [out].

    Returns:
        [..., out].
    """
    x = x.contiguous()
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    on_tensor_cores = x.dtype.itemsize == 2
    padded = 16 if on_tensor_cores else triton.next_power_of_2(rows)
    block_out = 16 if on_tensor_cores else 4
    out = x.new_empty(*x.shape[:-1], outputs)
    with on(x):
        _linear[(triton.cdiv(outputs, block_out),)](
            x,
            weight,
            bias,
            out,
            rows,
            outputs,
            PADDED=padded,
            INPUTS=inputs,
            BLOCK_OUT=block_out,
            BLOCK_IN=256 if on_tensor_cores else TILE // (block_out * padded),
            DOT=on_tensor_cores,
            ACTIVATION=activation,
            num_stages=4,
        )
    return out


@triton.jit
def _self_attention(
    qkv,
    keys,
    values,
    ancestors,
    positions,
    out,
    H: tl.constexpr,
    T: tl.constexpr,
    T_TABLE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One beam, one head: an online softmax that begins with the newest position, which no other program writes."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, beam = row // K, row % K
    position = tl.load(positions + sequence)
    d = tl.arange(0, D)
    own = qkv + row * (3 * H * D) + head * D + d
    query = tl.load(own).to(tl.float32)
    key, value = tl.load(own + H * D), tl.load(own + 2 * H * D)
    slot = (sequence * H + head) * (T * K * D)
    newest = slot + (position * K + beam) * D + d
    tl.store(keys + newest, key)
    tl.store(values + newest, value)
    history = ancestors + row * T_TABLE
    tl.store(history + position, beam, mask=head == 0)  # read in later steps

    highest = tl.sum(query * key.to(tl.float32), 0)
    total = tl.exp(highest - highest)
    attended = value.to(tl.float32)
    for first in range(0, position, BLOCK):
        t = first + tl.arange(0, BLOCK)
        seen = t < position
        at = (t * K + tl.load(history + t, mask=seen, other=0)) * D
        tile = slot + at[:, None] + d[None, :]
        old_keys = tl.load(keys + tile, mask=seen[:, None], other=0.0).to(tl.float32)
        old_values = tl.load(values + tile, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(query[None, :] * old_keys, 1), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        shrink, weights = tl.exp(highest - higher), tl.exp(scores - higher)
        total = total * shrink + tl.sum(weights, 0)
        attended = attended * shrink + tl.sum(weights[:, None] * old_values, 0)
        highest = higher
    tl.store(out + row * (H * D) + head * D + d, (attended / total).to(out.dtype.element_ty))


@triton.jit
def _cross_attention(
    query,
    keys,
    values,
    lengths,
    out,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence, one head, all its beams; rows from K on are filling."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + sequence).to(tl.int32)
    k, d = tl.arange(0, ROWS), tl.arange(0, D)
    rows = (sequence * K + k[:, None]) * (H * D) + head * D + d[None, :]
    queries = tl.load(query + rows, mask=k[:, None] < K, other=0.0)
    slot = (sequence * H + head) * (N * D)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, D], tl.float32)
    for first in range(0, length, BLOCK):
        n = first + tl.arange(0, BLOCK)
        seen = n < length
        tile = slot + n[:, None] * D + d[None, :]
        tile_keys = tl.load(keys + tile, mask=seen[:, None], other=0.0)
        tile_values = tl.load(values + tile, mask=seen[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(tile_keys), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink, weights = tl.exp(highest - higher), tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(tile_values.dtype), tile_values, input_precision="ieee")
        attended = attended * shrink[:, None] + weighted
        highest = higher
    attended = attended / total[:, None]
    tl.store(out + rows, attended.to(out.dtype.element_ty), mask=k[:, None] < K)


@triton.jit
def _add_norm(x, residual, weight, bias, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    e = tl.arange(0, BLOCK)
    there = e < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + e
    added = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    added += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + e, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + e, mask=there, other=0.0).to(tl.float32)
    centred = tl.where(there, added - tl.sum(added, 0) / WIDTH, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    tl.store(out + at, (centred / deviation * scale + shift).to(out.dtype.element_ty), mask=there)


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
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A few outputs of all rows: on tensor cores, or summed by element, and across a row once at the end."""
    r, i = tl.arange(0, PADDED), tl.arange(0, BLOCK_IN)
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    from_weight = o.to(tl.int64)[:, None] * INPUTS + i[None, :]
    from_x = r[:, None] * INPUTS + i[None, :]
    if DOT:
        y = tl.zeros([PADDED, BLOCK_OUT], tl.float32)
    else:
        sums = tl.zeros([PADDED, BLOCK_OUT, BLOCK_IN], tl.float32)
    for first in range(0, INPUTS, BLOCK_IN):
        there = (first + i)[None, :] < INPUTS
        w = tl.load(weight + from_weight + first, mask=there & (o[:, None] < outputs), other=0.0)
        read = tl.load(x + from_x + first, mask=there & (r[:, None] < rows), other=0.0)
        if DOT:
            y += tl.dot(read, tl.trans(w))
        else:
            sums += read.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    if not DOT:
        y = tl.sum(sums, 2)
    y += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_new":  # its tanh, written as what there is: 1 - 2 / (exp(2 u) + 1)
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    at = r[:, None] * outputs + o[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(r[:, None] < rows) & (o[None, :] < outputs))
