"""The caches as the layers of one decode step use them: each writes its newest keys and values, and attends.

Rows come and go as products read and write them, [S*K, E]. Two forms: torch's operations, on matrices laid out for
them, and kernels of ours that read the caches as they lie. Does not know networks, nor where the caches' memory is.

Shapes: S sequences, K beams, H heads, D head size, E = H * D, t target and n source positions that a step reads, C, T
and N what the cache has room for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from app.engine.attention import attend


class StepCache(ABC):
    """What one decode step reads and writes of the caches."""

    @abstractmethod
    def self_attention(self, layer: int, qkv: Tensor) -> Tensor:
        """Queries, scaled already, keys and values [S*K, 3*E] -> each beam over its own history, [S*K, E]."""

    @abstractmethod
    def cross_attention(self, layer: int, query: Tensor) -> Tensor:
        """Scaled queries [S*K, E] -> each over its sequence's source, [S*K, E]."""


@dataclass(frozen=True)
class TorchStepCache(StepCache):
    """Laid out once for all layers of the step: views of the cache, no copies.

    Attributes:
        keys, values: self-attention's of each layer, [S*H, t*K, D] for t target positions.
        mask: [S*H, K, t*K], 0 where beam k's history goes on and -inf elsewhere.
        cross_keys, cross_values: of each layer, [S*H, n, D] for n source positions.
        cross_mask: [S*H, 1, n], 0 up to each sequence's length and -inf behind it; None if all are of length n.
        places: of each layer [*, K*D]: all there is to write to.
        newest: [2*S*H], the places of this step's keys, then of its values.
        size: S.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    cross_keys: tuple[Tensor, ...]
    cross_values: tuple[Tensor, ...]
    cross_mask: Tensor | None
    places: tuple[Tensor, ...]
    newest: Tensor
    size: int

    def self_attention(self, layer: int, qkv: Tensor) -> Tensor:
        """See `StepCache`."""
        queries, keys_values = torch.split_with_sizes(self._by_head(qkv, 3), (1, 2))
        self.places[layer].index_copy_(0, self.newest, keys_values.flatten(0, 1).flatten(1))
        return self._by_row(attend(queries[0], self.keys[layer], self.values[layer], self.mask), qkv.dtype)

    def cross_attention(self, layer: int, query: Tensor) -> Tensor:
        """See `StepCache`."""
        queries = self._by_head(query, 1)[0]
        attended = attend(queries, self.cross_keys[layer], self.cross_values[layer], self.cross_mask)
        return self._by_row(attended, query.dtype)

    def _by_head(self, x: Tensor, parts: int) -> Tensor:
        """[S*K, parts*H*D] -> [parts, S*H, K, D]: the rows that attention takes together stand together."""
        keys = self.keys[0]
        heads, head_size = keys.shape[0] // self.size, keys.shape[2]
        split = x.to(keys.dtype).view(self.size, -1, parts, heads, head_size)
        return split.permute(2, 0, 3, 1, 4).reshape(parts, -1, x.shape[0] // self.size, head_size)

    def _by_row(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[S*H, K, D] -> [S*K, H*D]: back again."""
        by_row = x.view(self.size, -1, *x.shape[1:]).transpose(1, 2).to(dtype)
        return by_row.reshape(self.size * x.shape[1], -1)


@dataclass(frozen=True)
class KernelStepCache(StepCache):
    """The caches themselves; two kernels a layer do the rest, the entries in the table of ancestors included.

    Attributes:
        kernels: `app.engine.triton_kernels`, or `app.engine.cpu_kernels`.
        keys, values: self-attention's of each layer, [C, H, T, K, D].
        cross_keys, cross_values: of each layer, [C, H, N, D].
        ancestors: [C, K, T].
        positions: [S].
        source_lengths: [S].
    """

    kernels: ModuleType
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cross_keys: tuple[Tensor, ...]
    cross_values: tuple[Tensor, ...]
    ancestors: Tensor
    positions: Tensor
    source_lengths: Tensor

    def self_attention(self, layer: int, qkv: Tensor) -> Tensor:
        """See `StepCache`."""
        attended: Tensor = self.kernels.self_attention(
            qkv, self.keys[layer], self.values[layer], self.ancestors, self.positions
        )
        return attended

    def cross_attention(self, layer: int, query: Tensor) -> Tensor:
        """See `StepCache`."""
        attended: Tensor = self.kernels.cross_attention(
            query, self.cross_keys[layer], self.cross_values[layer], self.source_lengths
        )
        return attended
