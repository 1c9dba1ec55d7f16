"""Attention in the form that the device computes fastest: of a source's tokens, and of a sequence's few beams.

Does not know caches, layers or beams' histories. Shapes: n tokens, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_source(qkv: Tensor) -> Tensor:
    """All tokens of a source over each other.

    In 16 bits on a CPU, two products take less time than scaled_dot_product_attention (`python -m benchmarks.kernels`).

    Args:
        qkv: [n, 3, H, D], queries scaled already.

    Returns:
        [n, H * D].
    """
    by_head = qkv.permute(1, 2, 0, 3)  # [3, H, n, D]
    if qkv.device.type == "cpu" and qkv.dtype.itemsize == 2:
        query, keys, values = by_head.contiguous()
        attended = torch.bmm(torch.bmm(query, keys.transpose(1, 2)).softmax(-1), values)
    else:
        query, keys, values = by_head[:, None]
        attended = F.scaled_dot_product_attention(query, keys, values, scale=1.0)[0]
    return attended.transpose(0, 1).flatten(1)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """A few queries on the keys that they share: two batched matrix products and a softmax between them.

    With 4 queries on 512 keys, faster on a CPU than scaled_dot_product_attention, which is made for as many queries as
    keys. In fp32 the keys are the first product's left side, whose rows are many; in 16 bits oneDNN multiplies the
    queries by keys as they lie, and faster so (`python -m benchmarks.kernels` prints the times of each form).

    Args:
        query: [B, K, D], scaled already.
        keys: [B, W, D].
        values: [B, W, D].
        mask: [B, K or 1, W], added to the scores; None adds nothing.

    Returns:
        [B, K, D].
    """
    if query.dtype is torch.float32:
        scores = _product(keys, query.transpose(1, 2), None if mask is None else mask.transpose(1, 2))  # [B, W, K]
        scores = scores.transpose(1, 2).contiguous()
    else:
        scores = _product(query, keys.transpose(1, 2), mask)
    return torch.bmm(scores.softmax(-1), values)


def _product(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    return torch.bmm(left, right) if added is None else torch.baddbmm(added, left, right)
