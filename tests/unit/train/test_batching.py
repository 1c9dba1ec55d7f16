"""Every row once an epoch, in batches that pad little, and the same steps on any number of processes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from train.batching import BatchPlan, Lengths, Padding, ProcessBatches, token_batches

RNG = np.random.default_rng(0)
ROWS = 501
SOURCES: Lengths = np.clip(RNG.gamma(4.0, 50.0, ROWS), 8, 512).astype(np.int64)
TARGETS: Lengths = np.clip(SOURCES // 8 + RNG.integers(0, 20, ROWS), 3, 128)

BY_ROWS = BatchPlan(rows=8, tokens=None, per_step=2, grouped=True, seed=13)
AT_RANDOM = BatchPlan(rows=8, tokens=None, per_step=2, grouped=False, seed=13)
BY_TOKENS = BatchPlan(rows=0, tokens=4096, per_step=2, grouped=True, seed=13)
PLANS = pytest.mark.parametrize("plan", [BY_ROWS, AT_RANDOM, BY_TOKENS], ids=["rows", "random", "tokens"])


def of_process(plan: BatchPlan, processes: int, rank: int, epoch: int = 0) -> list[list[int]]:
    batches = ProcessBatches(plan, SOURCES, TARGETS, processes, rank)
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(found) == len(batches)
    return found


@PLANS
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_row_counts_once_whatever_the_number_of_processes(plan: BatchPlan, processes: int) -> None:
    shares = [of_process(plan, processes, rank) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1  # or the last step would wait for ever
    rows = [row for share in shares for batch in share for row in batch]
    assert sorted(row for row in rows if row >= 0) == list(range(ROWS))
    idle = [row for row in rows if row < 0]
    assert len(idle) < processes
    assert set(idle) <= {~int(np.argmin(SOURCES))}


@PLANS
def test_a_step_of_two_processes_is_a_step_of_one_that_accumulates_twice(plan: BatchPlan) -> None:
    one, first, second = of_process(plan, 1, 0, 3), of_process(plan, 2, 0, 3), of_process(plan, 2, 1, 3)
    for step, (mine, yours) in enumerate(zip(first, second, strict=True)):
        together = [row for batch in one[2 * step : 2 * step + 2] for row in batch]
        assert [row for row in mine + yours if row >= 0] == together


def test_a_step_of_batches_of_half_the_rows_is_the_same_step() -> None:
    whole = BatchPlan(rows=16, tokens=None, per_step=1, grouped=True, seed=13).batches(SOURCES, TARGETS, 1)
    halves = BY_ROWS.batches(SOURCES, TARGETS, 1)
    assert [halves[i] + halves[i + 1] for i in range(0, len(halves) - 1, 2)] == whole[: len(halves) // 2]


@PLANS
def test_epochs_differ_in_order_and_not_in_length(plan: BatchPlan) -> None:
    epochs = [plan.batches(SOURCES, TARGETS, epoch) for epoch in range(4)]
    assert len({len(batches) for batches in epochs}) == 1
    as_sets = [{frozenset(batch) for batch in batches} for batches in epochs]
    # Not the same rows together every time, either.
    assert len(as_sets[0] & as_sets[1]) < len(epochs[0]) / 4
    assert plan.batches(SOURCES, TARGETS, 2) == epochs[2]


def padded(batches: list[list[int]]) -> int:
    return sum(len(rows) * int(SOURCES[rows].max() + TARGETS[rows].max()) for rows in batches)


def test_no_batch_has_more_padded_tokens_than_the_budget() -> None:
    for seed in range(5):
        batches = token_batches(SOURCES, TARGETS, 4096, np.random.default_rng(seed))
        assert max(padded([rows]) for rows in batches) <= 4096
        # and most come near it, or there would be more steps than needed
        assert np.median([padded([rows]) for rows in batches]) > 0.75 * 4096


@pytest.mark.parametrize(
    ("padding", "tokens"), [(Padding(48), 4096), (Padding(32), 640), (Padding(limits=(512, 128)), 4096)]
)
def test_the_budget_counts_the_padding_that_settings_ask_for(padding: Padding, tokens: int) -> None:
    plan = replace(BY_TOKENS, tokens=tokens, padding=padding)
    epochs = [plan.batches(SOURCES, TARGETS, epoch) for epoch in range(4)]
    assert len({len(batches) for batches in epochs}) == 1
    for batches in epochs:
        assert sorted(row for rows in batches for row in rows) == list(range(ROWS))
        sizes = []
        for rows in batches:
            lengths = [int(SOURCES[rows].max()), int(TARGETS[rows].max())]
            if padding.limits is not None:
                lengths = list(padding.limits)
            sizes.append(len(rows) * sum(-(-length // padding.multiple) * padding.multiple for length in lengths))
        assert max(sizes) <= tokens
        assert np.median(sizes) > 0.6 * tokens


def test_the_longest_row_is_a_batch_even_where_its_cell_is_longer_than_the_budget() -> None:
    rng = np.random.default_rng(0)
    assert token_batches(np.asarray([50, 50]), np.asarray([10, 10]), 60, rng) in ([[0], [1]], [[1], [0]])


def test_grouping_pads_little() -> None:
    tokens = int(SOURCES.sum() + TARGETS.sum())
    assert padded(AT_RANDOM.batches(SOURCES, TARGETS, 1)) > 1.5 * tokens
    assert padded(BY_ROWS.batches(SOURCES, TARGETS, 1)) < 1.25 * tokens
    assert padded(BY_TOKENS.batches(SOURCES, TARGETS, 1)) < 1.15 * tokens


def test_the_longest_source_comes_first_in_the_first_epoch_only() -> None:
    assert int(np.argmax(SOURCES)) in BY_ROWS.batches(SOURCES, TARGETS, 0)[0] + BY_ROWS.batches(SOURCES, TARGETS, 0)[1]
    starts = {int(SOURCES[BY_ROWS.batches(SOURCES, TARGETS, epoch)[0]].max()) for epoch in range(1, 5)}
    assert len(starts) > 1


def test_steps_are_not_in_order_of_length() -> None:
    """Sorted steps would make the loss, and the gradient's noise, rise and fall with the length of texts."""
    for plan in (BY_ROWS, BY_TOKENS):
        longest = [int(SOURCES[rows].max()) for rows in plan.batches(SOURCES, TARGETS, 1)]
        assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < (0.75 if plan is BY_ROWS else 0.4)
