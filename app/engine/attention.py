"""Attention in the form that the device computes fastest: of a source's tokens, and of a sequence's few beams.

Does not know caches, layers or beams' histories. Shapes: n tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN's, which is compiled for every new shape, for longer than a batch of sources takes.
_ON_CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Sources are padded to a multiple of it: kernels with a mask want rows of whole vectors, and shapes repeat.
_PADDED_TO = 64


@dataclass(frozen=True)
class Padding:
    """How sources that lie one behind the other, P tokens, become B rows of n, and how they come back.

    Attributes:
        rows: [B, n], which of the P tokens stands there; behind a source's end its last one: of another's, which might
            be no number, not even a masked one may be there.
        mask: [B, 1, 1, n], whether there is one; None where all are.
        places: [P], where in B * n each token stands.
    """

    rows: Tensor
    mask: Tensor | None
    places: Tensor

    @classmethod
    def of(cls, lengths: ListLike[int], device: torch.device) -> Padding:
        """For sources of these lengths."""
        width = -(-max(lengths) // _PADDED_TO) * _PADDED_TO
        length = torch.tensor(lengths)
        at = torch.arange(width)
        is_token = at < length[:, None]  # [B, n]
        rows = (length.cumsum(0) - length)[:, None] + at.minimum(length[:, None] - 1)
        mask = None if bool(is_token.all()) else is_token[:, None, None].to(device)
        return cls(rows.to(device), mask, is_token.flatten().nonzero()[:, 0].to(device))


def attend_sources(
    qkv: Tensor, lengths: ListLike[int], padding: Padding | None = None, kernels: ModuleType | None = None
) -> Tensor:
    """All tokens of each source over those of the same source.

    Args:
        qkv: [P, 3, H, D], sources one behind the other, queries scaled already.
        lengths: of each source; their sum is P.
        padding: of these lengths, for a device that is faster with all sources at once; None takes one after the other.
        kernels: `app.engine.cpu_kernels` where they are faster.

    Returns:
        [P, H * D].
    """
    if kernels is not None and kernels.fits(qkv.shape[-1], keys=0):  # room for the keys is as large as they are many
        attended: Tensor = kernels.source_attention(qkv, lengths)
        return attended
    if padding is None:
        return torch.cat([attend_source(source) for source in torch.split(qkv, list(lengths))])
    query, keys, values = qkv[padding.rows].permute(2, 0, 3, 1, 4)  # each [B, H, n, D]
    with sdpa_kernel(_ON_CUDA):
        attended = F.scaled_dot_product_attention(query, keys, values, padding.mask, scale=1.0)
    return attended.transpose(1, 2).flatten(0, 1).flatten(1)[padding.places]


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
