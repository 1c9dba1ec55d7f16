"""Keys and values that decoding reads again: per beam for self-attention, per sequence for cross-attention.

Knows slots and beams. Does not know what a slot holds, nor the networks that read it.

Shapes: L layers, C capacity in slots, K beams, H heads, D head size, T target and N source positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Both caches for one width of beam search; the running slots are always the first S of C.

    The cross cache holds one copy a sequence, whatever its number of beams: every beam reads the same source (the
    sharing alone gave fairseq 1.9x, see CTranslate2 `src/layers/attention.cc` for the same idea).
    """

    def __init__(
        self,
        num_layers: int,
        num_beams: int,
        num_heads: int,
        head_size: int,
        max_source: int,
        max_target: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = 0
        self._self_shape = (num_beams, num_heads, max_target, head_size)
        self._cross_shape = (num_heads, max_source, head_size)
        empty = torch.empty(0, device=device, dtype=dtype)
        self.self_kv = empty.view(num_layers, 2, 0, *self._self_shape)  # [L, 2, C, K, H, T, D]
        self.cross_kv = empty.view(num_layers, 2, 0, *self._cross_shape)  # [L, 2, C, H, N, D]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` slots; what is held stays."""
        self.self_kv = _grown(self.self_kv, capacity)
        self.cross_kv = _grown(self.cross_kv, capacity)
        self.capacity = capacity

    def write_cross(self, slot: int, kv: Tensor) -> None:
        """Hold an admitted sequence's cross keys and values, [L, 2, H, n, D]."""
        self.cross_kv[:, :, slot, :, : kv.shape[-2]] = kv

    def append(self, layer: int, key: Tensor, value: Tensor, positions: Tensor, target: int) -> tuple[Tensor, Tensor]:
        """Write one step's keys and values, [S, K, H, D] at `positions` [S]; returns all, [S*K, H, target, D]."""
        size = key.shape[0]
        slots = torch.arange(size, device=key.device)
        views = []
        for index, new in enumerate((key, value)):
            held = self.self_kv[layer, index, :size]  # [S, K, H, T, D]
            held[slots, :, :, positions] = new
            views.append(held.flatten(0, 1)[:, :, :target])
        return views[0], views[1]

    def cross(self, layer: int, size: int, source: int) -> tuple[Tensor, Tensor]:
        """The first `size` slots' cross keys and values, each [S, H, source, D]."""
        held = self.cross_kv[layer, :, :size, :, :source]
        return held[0], held[1]

    def reorder(self, parents: Tensor, target: int) -> None:
        """Beam k goes on from beam `parents[s, k]` ([S, K]); only the `target` positions in use move."""
        size = parents.shape[0]
        slots = torch.arange(size, device=parents.device)[:, None]
        held = self.self_kv[:, :, :size, :, :, :target]
        held.copy_(held[:, :, slots, parents])

    def clear(self, slot: int) -> None:
        """Forget a slot whose content is not numbers: masked positions are multiplied by 0, and 0 * NaN is NaN."""
        self.self_kv[:, :, slot] = 0
        self.cross_kv[:, :, slot] = 0

    def move(self, source: int, target: int) -> None:
        """Slot `source`'s content becomes slot `target`'s."""
        self.self_kv[:, :, target] = self.self_kv[:, :, source]
        self.cross_kv[:, :, target] = self.cross_kv[:, :, source]


def _grown(cache: Tensor, capacity: int) -> Tensor:
    # zeros, not empty, for the reason in `clear`.
    new = torch.zeros(*cache.shape[:2], capacity, *cache.shape[3:], device=cache.device, dtype=cache.dtype)
    new[:, :, : cache.shape[2]] = cache
    return new
