"""Attention of a step, over caches as they lie, and of whole sources: see `attention.c` and `source_attention.c`.

Does not know caches' histories, nor networks. Shapes: S sequences, K beams, H heads, D head size, E = H * D, C slots, T
target and N source positions.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from app.engine.cpu_kernels.compiled import MOST_KEYS, address, check_shape, format_of, library

_CACHES = (torch.float32, torch.bfloat16)


def fits(head_size: int, keys: int) -> bool:
    """Whether attention over so many keys of this size is computed here."""
    return head_size % library().lanes == 0 and keys <= MOST_KEYS


def source_attention(qkv: Tensor, lengths: ListLike[int]) -> Tensor:
    """All tokens of each source over those of the same source, whatever sources stand beside it.

    Args:
        qkv: [P, 3, H, D] fp32, sources one behind the other, queries scaled already; D of a size that `fits`.
        lengths: of each source; their sum is P.

    Returns:
        [P, E].
    """
    tokens, _, heads, head_size = qkv.shape
    check_shape("qkv", qkv, (sum(lengths), 3, heads, head_size))
    _check_heads(head_size, len(lengths), len(lengths))
    if min(lengths, default=0) < 0:
        raise ValueError(f"sources of {list(lengths)} tokens")
    qkv, counts, threads = qkv.contiguous(), torch.tensor(lengths, dtype=torch.int64), torch.get_num_threads()
    longest = max(lengths, default=0)
    room = torch.empty(threads, library().code.source_attention_room(longest, head_size), dtype=torch.float32)
    attended = torch.empty(tokens, heads * head_size, dtype=torch.float32)
    library().code.source_attention(
        address(qkv),
        address(counts, torch.int64),
        address(attended),
        address(room),
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
        keys: [C, H, T, K, D] fp32 or bf16, dense; written at `positions`.
        values: the same.
        ancestors: [C, K, T or more] int64, dense: which beam wrote position t of a beam's history; written at
            `positions`.
        positions: [S] int64, less than T and than what `fits`.

    Returns:
        [S*K, E].
    """
    size, (slots, heads, target, beams, head_size) = len(positions), keys.shape
    width = heads * head_size
    check_shape("qkv", qkv, (size * beams, 3 * width))
    check_shape("values", values, keys.shape)
    check_shape("ancestors", ancestors, (slots, beams, max(ancestors.shape[2], target)))
    _check_heads(head_size, size, slots)
    qkv = qkv.contiguous()
    attended = torch.empty(size * beams, width, dtype=torch.float32)
    library().code.self_attention(
        address(qkv),
        address(keys, keys.dtype),
        address(values, keys.dtype),
        address(ancestors, torch.int64),
        address(positions, torch.int64),
        address(attended),
        size,
        beams,
        heads,
        head_size,
        target,
        ancestors.shape[2],
        format_of("keys", keys, _CACHES),
        torch.get_num_threads(),
    )
    return attended


def cross_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Each beam over its sequence's source.

    Args:
        query: [S*K, E] fp32, scaled already.
        keys: [C, H, N, D] fp32 or bf16, dense.
        values: the same.
        lengths: [S] int64, of the sources, at most N and what `fits`.

    Returns:
        [S*K, E].
    """
    size, (slots, heads, source, head_size) = len(lengths), keys.shape
    beams = len(query) // max(size, 1)
    check_shape("query", query, (size * beams, heads * head_size))
    check_shape("values", values, keys.shape)
    _check_heads(head_size, size, slots)
    query = query.contiguous()
    attended = torch.empty(query.shape, dtype=torch.float32)
    library().code.cross_attention(
        address(query),
        address(keys, keys.dtype),
        address(values, keys.dtype),
        address(lengths, torch.int64),
        address(attended),
        size,
        beams,
        heads,
        head_size,
        source,
        format_of("keys", keys, _CACHES),
        torch.get_num_threads(),
    )
    return attended


def _check_heads(head_size: int, size: int, slots: int) -> None:
    lanes = library().lanes
    if head_size % lanes or size > slots:
        raise ValueError(f"heads of {head_size}, {size} sequences: heads of a multiple of {lanes}, at most {slots} fit")
