"""Of the network: attention of a step, residual and norm. Products of few rows: `products.py`.

Shapes: S sequences, K beams, H heads, D head size (a power of two), E = H * D, C slots of a cache, T target and N
source positions that it has room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.engine.triton_kernels.launch import begin, on, overlap

# Elements of a tile of keys: what four warps hold in registers beside its values.
TILE = 4096
# Of an H100 or H200: a kernel should have as many programs at least.
MULTIPROCESSORS = 132
# Parts of a source at most: the kernel that joins them reads all.
MAX_PARTS = 8


def fits(head_size: int, keys: int) -> bool:
    """Whether attention over heads of this size is computed here: of any number of keys."""
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
            **overlap(qkv),
        )
    return out


def source_parts(size: int, heads: int, room: int, head_size: int) -> int:
    """In how many parts of the source so many sequences' cross-attention keeps the GPU busy; 1 where it does anyway."""
    wanted = min(MULTIPROCESSORS // (size * heads), MAX_PARTS, room * head_size // TILE)
    return 1 << (max(wanted, 1).bit_length() - 1)


def cross_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, parts: int | None = None) -> Tensor:
    """All beams of a sequence over the keys and values of its source, up to its length.

    A sequence's head is one program, which reads its keys and values with the next tile on its way. Of few sequences it
    is several, each for a part of the source; a second kernel joins them.

    Args:
        query: [S*K, E], scaled already.
        keys: [C, H, N, D], dense.
        values: the same.
        lengths: [S] int64, at least 1.
        parts: of each source, a power of two; None for `source_parts`.

    Returns:
        [S*K, E].
    """
    _, heads, room, head_size = keys.shape
    size, (rows, width) = lengths.shape[0], query.shape
    parts = source_parts(size, heads, room, head_size) if parts is None else parts
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    attended = out if parts == 1 else out.new_empty(parts, rows, width, dtype=torch.float32)
    logs = out if parts == 1 else out.new_empty(parts, rows, heads, dtype=torch.float32)
    with on(query):
        _cross_attention[(size, heads, parts)](
            query.contiguous(),
            keys,
            values,
            lengths,
            attended,
            logs,
            H=heads,
            N=room,
            K=rows // size,
            ROWS=max(16, triton.next_power_of_2(rows // size)),  # what a tensor core takes at least
            D=head_size,
            BLOCK=TILE // head_size,
            PARTS=parts,
            num_stages=3 if query.dtype.itemsize == 2 else 2,
            **overlap(query),
        )
        if parts > 1:
            _join_parts[(rows, heads)](
                attended, logs, out, rows, H=heads, D=head_size, PARTS=parts, num_warps=1, **overlap(query)
            )
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x + residual.

    Args:
        x: [..., E], or parts of it that are still to be added up, [P, ..., E].
        residual: [..., E].
    """
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty_like(residual)
    width = residual.shape[-1]
    block = triton.next_power_of_2(width)
    with on(residual):
        _add_norm[(residual.numel() // width,)](
            x,
            residual,
            weight,
            bias,
            out,
            eps,
            PARTS=x.numel() // residual.numel(),
            WIDTH=width,
            BLOCK=block,
            num_warps=4 if block <= 1024 else 8,
            **overlap(residual),
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
    PDL: tl.constexpr,
):
    """One beam, one head: an online softmax that begins with the newest position, which no other program writes."""
    begin(PDL)
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
    logs,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One sequence, one head, one part of the source, all beams; rows from K on are filling."""
    begin(PDL)
    sequence, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence).to(tl.int32)
    k, d = tl.arange(0, ROWS), tl.arange(0, D)
    rows = (sequence * K + k[:, None]) * (H * D) + head * D + d[None, :]
    queries = tl.load(query + rows, mask=k[:, None] < K, other=0.0)
    slot = (sequence * H + head) * (N * D)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, D], tl.float32)
    share = tl.cdiv(tl.cdiv(length, BLOCK), PARTS) * BLOCK
    for first in range(part * share, tl.minimum(part * share + share, length), BLOCK):
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
    if PARTS > 1:
        total = tl.where(total == 0.0, 1.0, total)  # of an empty part, whose highest is -inf
        all_rows = tl.num_programs(0).to(tl.int64) * K
        row = (part * all_rows + sequence * K + k) * H
        tl.store(logs + row + head, highest + tl.log(total), mask=k < K)
        out += part * all_rows * (H * D)
    attended = attended / total[:, None]
    tl.store(out + rows, attended.to(out.dtype.element_ty), mask=k[:, None] < K)


@triton.jit
def _join_parts(parts, logs, out, rows, H: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):
    """One row, one head: what its parts attended to, weighted by their sums of exponentials."""
    begin(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    p, d = tl.arange(0, PARTS), tl.arange(0, D)
    place = (p * rows + row) * H + head
    logsumexp = tl.load(logs + place)
    share = tl.exp(logsumexp - tl.max(logsumexp, 0))
    attended = tl.load(parts + place[:, None] * D + d[None, :])
    joined = tl.sum(share[:, None] * attended, 0) / tl.sum(share, 0)
    tl.store(out + (row * H + head) * D + d, joined.to(out.dtype.element_ty))


@triton.jit
def _add_norm(
    x,
    residual,
    weight,
    bias,
    out,
    eps,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    begin(PDL)
    e = tl.arange(0, BLOCK)
    there = e < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + e
    added = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        added += tl.load(x + part * tl.num_programs(0) * WIDTH + at, mask=there, other=0.0).to(tl.float32)
    added += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + e, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + e, mask=there, other=0.0).to(tl.float32)
    centred = tl.where(there, added - tl.sum(added, 0) / WIDTH, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    tl.store(out + at, (centred / deviation * scale + shift).to(out.dtype.element_ty), mask=there)
