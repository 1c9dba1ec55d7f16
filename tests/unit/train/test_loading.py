"""Batches as tensors: padding, and the same batches whoever makes them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.arguments import batch_plan
from train.batching import BatchPlan
from train.config import ConfigError
from train.data import tokenise
from train.denoising import NoisedBatches, NoisedTexts, stage_config, text_rows
from train.loading import EpochLoader, collator, epoch_loader, train_loader
from train.streaming import StreamedBatches
from train.warm_start import warm_start

from .conftest import make_config, make_pairs

# From Python 3.12 on, for the threads of torch and of the tokenizers: neither is used in a worker.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
PLAN = BatchPlan(rows=4, tokens=None, per_step=1, grouped=True, seed=13)


def epochs(loader: Any, count: int = 2) -> list[list[dict[str, torch.Tensor]]]:
    found = []
    for epoch in range(count):
        loader.set_epoch(epoch)
        found.append([dict(batch) for batch in loader])
    return found


def assert_same(first: list[list[dict[str, torch.Tensor]]], second: list[list[dict[str, torch.Tensor]]]) -> None:
    assert [len(epoch) for epoch in first] == [len(epoch) for epoch in second]
    for one, other in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@forks
def test_workers_make_the_batches_that_the_run_itself_would(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path)
    start = warm_start(config.model, config.generation)
    rows = tokenise(make_pairs(18, seed=3), start.tokenizer, config.data)
    alone, helped = (
        epochs(train_loader(rows, PLAN, collator(start, config.data), workers=workers)) for workers in (0, 2)
    )
    assert_same(alone, helped)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*alone, strict=True))


@forks
def test_workers_draw_the_noise_of_their_epoch(base: Path, data: Path, texts: Path, tmp_path: Path) -> None:
    noise = {"path": str(texts), "max_tokens": 32}
    config = stage_config(make_config(base, data, tmp_path, denoising=noise))
    start = warm_start(config.model, config.generation)
    written = ["w1 w2 w3 w4 w5. w6 w7 w8 w9.", "w10 w11 w12 w13 w14 w15 w16 w17 w18 w19"] * 4

    def loader(workers: int) -> EpochLoader:
        rows = NoisedTexts(
            text_rows(written, start.tokenizer, config.denoising, workers), start.tokenizer, config.denoising
        )
        return epoch_loader(rows, NoisedBatches(rows, PLAN, 1, 0), collator(start, config.data), False, workers)

    alone, helped = epochs(loader(0)), epochs(loader(2))
    assert_same(alone, helped)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*alone, strict=True))


def test_lengths_are_rounded_up_where_a_device_wants_few_shapes(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path, data={"pad_to_multiple_of": 8})
    start = warm_start(config.model, config.generation)
    pairs = make_pairs(3, seed=7)
    rows = [dict(row) for row in tokenise(pairs, start.tokenizer, config.data)]
    batch = collator(start, config.data)(rows)
    longest = {name: max(len(row[name]) for row in rows) for name in ("input_ids", "labels")}
    for name, length in longest.items():
        assert batch[name].shape[1] == int(np.ceil(length / 8) * 8)
    assert batch["attention_mask"].sum() == sum(len(row["input_ids"]) for row in rows)
    assert int((batch["labels"] != -100).sum()) == sum(len(row["labels"]) for row in rows)
    with pytest.raises(ConfigError, match=r"pad_to_multiple_of must be at least 1; it is 0"):
        make_config(base, data, tmp_path, data={"pad_to_multiple_of": 0})


PADDINGS: list[dict[str, Any]] = [
    {"padding": "max_length"},
    {"pad_to_multiple_of": 16},
    {"padding": "max_length", "pad_to_multiple_of": 16},
]


def padded_tokens(loader: Any) -> list[int]:
    return [batch["input_ids"].numel() + batch["labels"].numel() for batch in loader]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("options", PADDINGS)
def test_no_batch_has_more_tokens_than_the_budget_however_it_is_padded(
    base: Path, data: Path, tmp_path: Path, options: dict[str, Any], streaming: bool
) -> None:
    optim = {"batch_tokens": 160, "max_steps": 9}
    sections = {"data": {**options, "streaming": streaming}, "optim": optim, "eval": {"every_steps": 9}}
    config = make_config(base, data, tmp_path, **sections)
    start = warm_start(config.model, config.generation)
    plan, rows = batch_plan(config, 1), make_pairs(40, seed=3)
    dataset: Any = tokenise(rows, start.tokenizer, config.data)
    if streaming:
        dataset = StreamedBatches(config.data, start.tokenizer, {}, plan)
    sizes = padded_tokens(itertools.islice(train_loader(dataset, plan, collator(start, config.data)), 20))
    assert 80 < max(sizes) <= 160


@pytest.mark.parametrize("options", PADDINGS)
def test_no_batch_of_noised_texts_has_more_tokens_than_the_budget_however_it_is_padded(
    base: Path, data: Path, texts: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Texts of as many tokens as a multiple, to which the special ones come, and whose noise takes little away."""
    noise = {"path": str(texts), "max_tokens": 48, "batch_tokens": 96, "mask_share": 0.05}
    config = stage_config(make_config(base, data, tmp_path, data=options, denoising=noise))
    start = warm_start(config.model, config.generation)
    written = [" ".join(f"w{i % 60}" for i in range(at, at + length)) for at, length in enumerate((15, 16, 16, 7) * 6)]
    rows = NoisedTexts(text_rows(written, start.tokenizer, config.denoising), start.tokenizer, config.denoising)
    batches = NoisedBatches(rows, batch_plan(config, 1), 1, 0)
    loader = epoch_loader(rows, batches, collator(start, config.data), False)
    counts = set()
    for epoch in range(4):
        loader.set_epoch(epoch)
        sizes = padded_tokens(loader)
        counts.add(len(sizes))
        assert 48 <= max(sizes) <= 96
    assert len(counts) == 1
