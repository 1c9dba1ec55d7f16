"""Keys and values that decoding reads again: per beam for self-attention, per sequence for cross-attention.

Neither cache is ever reordered. All beams of a sequence are queries over the same keys: in cross-attention
because they read one source (the sharing alone gave fairseq 1.9x, see CTranslate2 `src/layers/attention.cc`), in
self-attention because each beam's history is a choice among the positions that all beams wrote; which ones is a table
(`ancestors`), and attention reads it as a mask, or a kernel as it is (`step_cache.py`). When beams change places, the
table's rows are gathered: K * T small numbers a sequence, where the keys and values of every layer would have been
moved. Does not know what a slot holds, nor the networks that read it.

Shapes: L layers, C capacity in slots, S running, K beams, H heads, D head size, T target and N source positions.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.kernels import step_kernels_for
from app.engine.step_cache import KernelStepCache, StepCache, TorchStepCache

# Of the room that there is: with less of it needed, less is made.
SLACK = 0.75


@dataclass(frozen=True)
class CacheShape:
    """The sizes of one cache; bytes follow from them."""

    num_layers: int
    num_beams: int
    num_heads: int
    head_size: int
    max_source: int
    max_target: int

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Device memory of one slot, in bytes."""
        positions = self.max_target * self.num_beams + self.max_source
        return 2 * self.num_layers * self.num_heads * positions * self.head_size * dtype.itemsize


class KVCache:
    """Both caches for one width of beam search; the running slots are always the first S of C.

    Laid out for T target and N source positions, which are the most there can be, or (`make_room`) about as many as the
    running sequences need.
    """

    def __init__(
        self,
        shape: CacheShape,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        rows: torch.dtype | None = None,
    ) -> None:
        """`dtype`: of keys and values. `rows`: of what is attended with, where it is another."""
        self.shape = shape
        self.capacity = capacity
        layers, heads, size = shape.num_layers, shape.num_heads, shape.head_size
        position = capacity * heads * size
        self._self_memory = reserve((layers, 2 * position * shape.max_target * shape.num_beams), device, dtype)
        self._cross_memory = reserve((2, layers, position * shape.max_source), device, dtype)
        self._lay_out(shape.max_target, shape.max_source)
        # Which beam wrote position t of beam k's history.
        self.ancestors = torch.zeros(capacity, shape.num_beams, shape.max_target, device=device, dtype=torch.long)
        self._kernels = step_kernels_for(device, rows or dtype)

    def _lay_out(self, target: int, source: int) -> None:
        shape = self.shape
        # Beams are innermost but one, so that the first t positions of all beams are one block, t * K keys long.
        layers, rows = shape.num_layers, (self.capacity, shape.num_heads)
        own = (2, *rows, target, shape.num_beams, shape.head_size)
        self.self_kv = self._self_memory[:, : math.prod(own)].view(layers, *own)  # [L, 2, C, H, T, K, D]
        others = (*rows, source, shape.head_size)
        cross = self._cross_memory[:, :, : math.prod(others)].view(2, layers, *others)
        self.cross_keys, self.cross_values = cross.unbind()  # each [L, C, H, N, D]

    def make_room(self, size: int, target: int, source: int) -> tuple[int, int]:
        """Lay the caches out without gaps for at least so many positions; what the first `size` slots hold stays.

        oneDNN's batched products copy keys and values that have gaps between slots. Less room is made only where at
        most `SLACK` of it is needed, because the content moves each time.

        Returns:
            T and N as they are now.
        """
        had = self.self_kv.shape[4], self.cross_keys.shape[3]
        room = tuple(
            now if needed <= now and needed > SLACK * now else needed
            for now, needed in zip(had, (target, source), strict=True)
        )
        if room != had:
            before = self.self_kv, self.cross_keys, self.cross_values
            self._lay_out(*room)
            after = self.self_kv, self.cross_keys, self.cross_values
            for old, new, slots, positions in zip(before, after, (2, 1, 1), (4, 3, 3), strict=True):
                kept = min(old.shape[positions], new.shape[positions])
                for from_, to in zip(old, new, strict=True):  # layer by layer: old and new lie in the same memory
                    left = from_.narrow(slots - 1, 0, size)
                    held = left.narrow(positions - 1, 0, kept).clone()
                    left.zero_()  # for the reason in `clear`: other slots lie there now
                    to.narrow(slots - 1, 0, size).narrow(positions - 1, 0, kept).copy_(held)
        return room[0], room[1]

    def write_cross(self, layer: int, first: int, kv: Tensor, sources: Tensor | ListLike[slice]) -> None:
        """Hold what admitted sequences, in the slots from `first` on, read in one layer of cross-attention.

        Args:
            kv: [P, 2, H, D], of all sources that were encoded together.
            sources: which of the P are each sequence's: a slice each, copied one by one; or [B, n], the one that stands
                at each position (behind a source's end any of its own), copied all at once.
        """
        if isinstance(sources, Tensor):
            slots, rows = slice(first, first + len(sources)), sources[:, : self.cross_keys.shape[3]]
            keys, values = kv[rows].permute(2, 0, 3, 1, 4)  # each [B, H, n, D]
            self.cross_keys[layer, slots, :, : keys.shape[2]] = keys
            self.cross_values[layer, slots, :, : keys.shape[2]] = values
            return
        for slot, source in enumerate(sources, first):
            keys, values = kv[source].permute(1, 2, 0, 3)  # each [H, n, D]
            self.cross_keys[layer, slot, :, : keys.shape[1]] = keys
            self.cross_values[layer, slot, :, : keys.shape[1]] = values

    def begin_step(
        self, positions: Tensor, source_lengths: Tensor, target: int, source: int, ragged: bool
    ) -> StepCache:
        """Every beam writes its own entry at `positions` in this step.

        Args:
            positions: [S].
            source_lengths: [S].
            target: t, more than any of `positions`.
            source: n, at least the longest of `source_lengths`.
            ragged: whether any source is shorter than n.
        """
        if self._kernels is not None and self._kernels.fits(self.shape.head_size, max(target, source)):
            keys, values = self.self_kv.unbind(1)
            return KernelStepCache(
                kernels=self._kernels,
                keys=keys.unbind(),
                values=values.unbind(),
                cross_keys=self.cross_keys.unbind(),
                cross_values=self.cross_values.unbind(),
                ancestors=self.ancestors,
                positions=positions,
                source_lengths=source_lengths,
            )
        size, heads = positions.shape[0], self.shape.num_heads
        own = torch.arange(self.shape.num_beams, device=positions.device)[None, :, None]  # [1, K, 1]
        at = positions[:, None, None].expand(size, self.shape.num_beams, 1)
        self.ancestors[:size].scatter_(2, at, own.expand_as(at))
        keys, values = self.self_kv[:, :, :size, :, :target].flatten(4, 5).flatten(2, 3).unbind(1)
        # Rows of [2, C, H, T, K*D].
        rows = torch.arange(2 * self.capacity * heads, device=positions.device).view(2, self.capacity, heads)
        newest = rows[:, :size] * self.self_kv.shape[4] + positions[:, None]  # [2, S, H]
        return TorchStepCache(
            keys=keys.unbind(),
            values=values.unbind(),
            mask=self._mask(positions, target).repeat_interleave(heads, 0),
            cross_keys=self.cross_keys[:, :size, :, :source].flatten(1, 2).unbind(),
            cross_values=self.cross_values[:, :size, :, :source].flatten(1, 2).unbind(),
            cross_mask=self._cross_mask(source_lengths, source).repeat_interleave(heads, 0) if ragged else None,
            places=self.self_kv.flatten(5).flatten(1, 4).unbind(),
            newest=newest.flatten(),
            size=size,
        )

    def _mask(self, positions: Tensor, target: int) -> Tensor:
        """[S, K, target * K], for the beams' histories."""
        device, dtype = positions.device, self.self_kv.dtype
        beams = torch.arange(self.shape.num_beams, device=device)
        written = torch.arange(target, device=device) <= positions[:, None]  # [S, target]
        mine = (self.ancestors[: positions.shape[0], :, :target, None] == beams) & written[:, None, :, None]
        mask = torch.zeros(mine.shape, device=device, dtype=dtype).masked_fill_(~mine, -torch.inf)
        return mask.flatten(2)

    def _cross_mask(self, source_lengths: Tensor, source: int) -> Tensor:
        """[S, 1, source], for sources of different lengths."""
        behind = torch.arange(source, device=source_lengths.device) >= source_lengths[:, None]
        mask = torch.zeros(behind.shape, device=behind.device, dtype=self.cross_keys.dtype)
        return mask.masked_fill_(behind, -torch.inf)[:, None]

    def follow(self, parents: Tensor, target: int) -> None:
        """Beam k goes on from beam `parents[s, k]` ([S, K]): it takes over that beam's history."""
        held = self.ancestors[: parents.shape[0], :, :target]
        held.copy_(held.gather(1, parents[:, :, None].expand_as(held)))

    def clear(self, slot: int) -> None:
        """Forget a slot whose content is not numbers: masked positions are multiplied by 0, and 0 * NaN is NaN."""
        self.self_kv[:, :, slot] = 0
        self.cross_keys[:, slot] = 0
        self.cross_values[:, slot] = 0

    def move(self, source: int, target: int, positions: int, source_length: int) -> None:
        """Slot `source`'s content becomes slot `target`'s: so many target positions and tokens of the source."""
        self.self_kv[:, :, target, :, :positions] = self.self_kv[:, :, source, :, :positions]
        self.cross_keys[:, target, :, :source_length] = self.cross_keys[:, source, :, :source_length]
        self.cross_values[:, target, :, :source_length] = self.cross_values[:, source, :, :source_length]
        self.ancestors[target] = self.ancestors[source]


def reserve(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros, for the reason in `clear`; on a CPU they take memory only where they have been written.

    There a map of the system's own: what no sequence has used costs nothing, the whole goes back at once, and blocks of
    every size do not come and go in the heap, which would keep the gaps between them.

    Raises:
        OSError: the system has no room for it.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
