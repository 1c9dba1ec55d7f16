"""Which rows make up a batch, a step and an epoch: rows of like length together, every row once, whoever trains.

Knows lengths in tokens, seeds and processes. Does not know texts, tensors or the model.

The order of an epoch is a list of batches that depends on the seed, the epoch and the size of a step alone. Process `p`
of `P` takes every `P`-th batch from the `p`-th on, so a step of `P` processes holds the rows of a step of one process
that accumulates `P` times as many batches (docs/adr/0017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Lengths = NDArray[np.int64]

# Cells of lengths, in tokens: rows of one cell change places between epochs, and no batch grows by it. Smaller cells
# pad less and mix fewer rows. `benchmarks/padding.py`, DialogSum, 8,192 tokens: 1.06 of the unpadded work; 8 x 4: 1.05.
SOURCE_CELL, TARGET_CELL = 16, 8
# Batches of fixed rows: at most so many steps are drawn at random, then sorted together; at most a quarter of the rows,
# or a small set would have the same batches every epoch.
STEPS_SORTED_TOGETHER = 50
# Inside those, source lengths are banded before sorting by target length, so that both sides pad little (ADR 4).
LENGTH_BAND = 32


@dataclass(frozen=True)
class Padding:
    """How far the collator pads (`train/loading.py`): a batch to its longest row or to the limits, then rounded up.

    Attributes:
        multiple: sources and targets are padded to one of this.
        limits: tokens that every source and every target is padded to, if not to the longest of its batch.
    """

    multiple: int = 1
    limits: tuple[int, int] | None = None

    def padded(self, lengths: Lengths) -> Lengths:
        """Tokens of sources and targets, `[rows, 2]`, in a batch in which each is the longest."""
        if self.limits is not None:
            lengths = np.maximum(lengths, self.limits)
        return -(-lengths // self.multiple) * self.multiple


TO_LONGEST = Padding()


@dataclass(frozen=True)
class BatchPlan:
    """How large a batch of one process is, and how many batches make a step.

    Attributes:
        rows: rows a batch, where `tokens` is None.
        tokens: most padded source and target tokens a batch; the number of rows follows. Always grouped by length.
        per_step: batches a step, of all processes and accumulation steps together.
        grouped: rows of like length together; else rows in random order.
        padding: what `tokens` counts beside the rows' own; it changes no batch of `rows`.
    """

    rows: int
    tokens: int | None
    per_step: int
    grouped: bool
    seed: int
    padding: Padding = TO_LONGEST

    def batches(self, sources: Lengths, targets: Lengths, epoch: int) -> list[list[int]]:
        """All batches of one epoch in order; each row stands in one of them. Their number is the same every epoch.

        Args:
            sources: tokens of each row's source, `[rows]`.
            targets: tokens of each row's target, `[rows]`.
        """
        rng = np.random.default_rng((self.seed, epoch))
        if self.tokens is not None:
            return token_batches(sources, targets, self.tokens, rng, padding=self.padding)
        return self._of_rows(sources, targets, rng, largest_first=epoch == 0)

    def _of_rows(
        self, sources: Lengths, targets: Lengths, rng: np.random.Generator, largest_first: bool
    ) -> list[list[int]]:
        order, step = rng.permutation(len(sources)), self.rows * self.per_step
        if not self.grouped:
            return [order[at : at + self.rows].tolist() for at in range(0, len(order), self.rows)]
        together = step * max(1, min(STEPS_SORTED_TOGETHER, len(order) // (4 * step)))
        parts = [order[at : at + together] for at in range(0, len(order), together)]
        ordered = np.concatenate([part[np.lexsort((targets[part], sources[part] // LENGTH_BAND))] for part in parts])
        # Steps are drawn again, or their lengths would rise and fall; a short one stays last, as the step it is.
        steps = [ordered[at : at + step] for at in range(0, len(ordered), step)]
        last = steps.pop() if len(steps[-1]) < step else None
        steps = [steps[i] for i in rng.permutation(len(steps))]
        if largest_first and steps:
            # What runs out of memory should do so at once.
            steps.insert(0, steps.pop(max(range(len(steps)), key=lambda i: int(sources[steps[i]].max()))))
        if last is not None:
            steps.append(last)
        return [rows[at : at + self.rows].tolist() for rows in steps for at in range(0, len(rows), self.rows)]


class ProcessBatches(Sampler[list[int]]):
    """The batches of one process. A negative index `~i` is row `i` without its labels: it adds nothing to the loss.

    Such rows fill the last round where there are fewer batches than processes: gradients are joined in every process
    or none, and a row that counted twice would change the step.
    """

    def __init__(self, plan: BatchPlan, sources: Lengths, targets: Lengths, processes: int = 1, rank: int = 0) -> None:
        self.plan, self.sources, self.targets = plan, sources, targets
        self.processes, self.rank = processes, rank
        self.epoch = 0
        self._rounds = math.ceil(len(plan.batches(sources, targets, 0)) / processes)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration runs through; the Trainer says it, on resuming too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rounds

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.plan.batches(self.sources, self.targets, self.epoch)
        idle = [~int(np.argmin(self.sources))]
        for at in range(self.rank, self._rounds * self.processes, self.processes):
            yield batches[at] if at < len(batches) else idle


def token_batches(
    sources: Lengths,
    targets: Lengths,
    tokens: int,
    rng: np.random.Generator,
    cell: tuple[int, int] = (SOURCE_CELL, TARGET_CELL),
    padding: Padding = TO_LONGEST,
) -> list[list[int]]:
    """Greedy batches along the rows, sorted by cell, those of one cell in random order; then batches in random order.

    A row counts as the longest that its cell may hold, padded. So batches have the same sizes whatever `rng` draws, and
    their number, which the schedule of the learning rate rests on, is the same in every epoch.
    """
    source, target = -(-sources // cell[0]), -(-targets // cell[1])
    # Up and down in turn: the last target of one source cell is near the first of the next.
    turned = np.where(source % 2 == 0, target, -target)
    order = np.lexsort((rng.permutation(len(sources)), turned, source))
    # The longest of all is known, and may be shorter than its cell.
    bounds = np.minimum(np.stack([source * cell[0], target * cell[1]], axis=1), [sources.max(), targets.max()])
    bounds = padding.padded(bounds)
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = bounds[order[0]]
    for row in order:
        grown = np.maximum(longest, bounds[row])
        if batch and (len(batch) + 1) * int(grown.sum()) > tokens:
            batches.append(batch)
            batch, grown = [], bounds[row]
        batch.append(int(row))
        longest = grown
    batches.append(batch)
    return [batches[i] for i in rng.permutation(len(batches))]
