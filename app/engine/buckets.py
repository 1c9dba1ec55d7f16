"""The sizes that a decode step is computed at: what is there, or the next of a few fixed sizes.

On a CPU cost follows what is active, so a step is as small as it can be, or nearly: where the caches are laid out anew
for another size, sizes change less often. On CUDA a step is a recorded graph, and there can only be so many of them.
Does not know what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Allowed sizes in rising order; empty allows every size.

    Attributes:
        slots: sequences a step computes.
        target: target positions that self-attention reads.
        source: source positions that cross-attention reads.
        compact: whether the caches follow: laid out for just the positions that are read, without gaps between slots.
    """

    slots: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    compact: bool = False

    @classmethod
    def multiples(cls, max_target: int, max_source: int) -> Buckets:
        """Any number of slots; multiples of 16 target and of 64 source positions, and each maximum; compact caches."""
        return cls((), _multiples(16, max_target), _multiples(64, max_source), compact=True)

    @classmethod
    def doubling(cls, max_num_seqs: int, max_target: int, max_source: int) -> Buckets:
        """1, 2, 4, ... slots; 32, 64, 128, ... target and 128, 256, ... source positions, up to each maximum."""
        return cls(_doubling(1, max_num_seqs), _doubling(32, max_target), _doubling(128, max_source))


def round_up(size: int, allowed: Sequence[int]) -> int:
    """The smallest allowed size that holds `size`."""
    return next((bucket for bucket in allowed if bucket >= size), size) if allowed else size


def _doubling(first: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return (*sizes, last)


def _multiples(step: int, last: int) -> tuple[int, ...]:
    return (*range(step, last, step), last)
