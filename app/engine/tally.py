"""What the engine counts of its own work: plain numbers that its thread writes and anybody may read, without a lock.

A reader may see a step's sum before its count, never a torn number. Does not know who reads, nor how time is measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as ListLike

ENCODE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Distribution:
    """How often a value fell at or below each bound, and the values' sum; an observation is two additions."""

    def __init__(self, bounds: ListLike[float]) -> None:
        """`bounds`: ascending."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: above every bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Tally:
    """The engine's counts since its start.

    Attributes:
        encode_seconds: of each call of the encoder, whatever the number of texts in it.
        step_seconds: of each decode step of all that runs.
        step_texts: texts running in each decode step; its sum is the number of tokens decoded, one a text and step.
        rows: rows decoded, one a beam or sample of a running text and step.
        late: texts dropped before they were encoded, because of their deadline.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.encode_seconds = Distribution(ENCODE_SECONDS)
        self.step_seconds = Distribution(STEP_SECONDS)
        self.step_texts = Distribution([*_powers_of_two_below(max_num_seqs), max_num_seqs])
        self.rows = 0
        self.late = 0


def _powers_of_two_below(limit: int) -> list[int]:
    return [1 << power for power in range((limit - 1).bit_length())]
