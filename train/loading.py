"""From tokenised rows to tensors: datasets, loaders and collators.

Knows padding. Does not know which rows make up a batch: `train/batching.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from train.batching import BatchPlan, ProcessBatches
from train.config import DataConfig
from train.streaming import Feature, StreamedBatches
from train.warm_start import WarmStart

Collator = Callable[[list[Feature]], dict[str, torch.Tensor]]


class Rows(torch.utils.data.Dataset[Feature]):
    """Tokenised rows by number. `~i` is row `i` with labels that the loss ignores (`ProcessBatches`)."""

    def __init__(self, tokens: Dataset) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Feature:
        row = self.tokens[index if index >= 0 else ~index]
        return row if index >= 0 else {"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])}


class EpochLoader(DataLoader[Any]):
    """A loader that tells its batches which epoch it is, as the Trainer expects of one."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before it iterates."""
        if isinstance(self.batch_sampler, ProcessBatches):
            self.batch_sampler.set_epoch(epoch)


def train_loader(
    dataset: Dataset | StreamedBatches,
    plan: BatchPlan,
    collate: Collator,
    processes: int = 1,
    rank: int = 0,
    workers: int = 0,
) -> DataLoader[Any]:
    """The training batches of one process; `workers` make them ahead, but for a stream, which is read in order."""
    pin = torch.cuda.is_available()
    if isinstance(dataset, StreamedBatches):
        return DataLoader(dataset, batch_size=None, collate_fn=collate, pin_memory=pin)
    sources, targets = (np.asarray([len(ids) for ids in dataset[name]], np.int64) for name in ("input_ids", "labels"))
    batches = ProcessBatches(plan, sources, targets, processes, rank)
    return epoch_loader(Rows(dataset), batches, collate, pin, workers)


def epoch_loader(
    rows: Any, batches: ProcessBatches, collate: Collator, pin_memory: bool, workers: int = 0
) -> EpochLoader:
    """Batches of one process in an order of their own for each epoch.

    Workers are forked anew for each epoch, after `set_epoch`: they see what the rows know of it. Nothing is pickled.
    """
    return EpochLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=pin_memory,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


def collator(start: WarmStart, data: DataConfig) -> Collator:
    """Rows to a batch: padded to its longest row or to the limits, with the labels shifted into decoder inputs."""
    to_longest = DataCollatorForSeq2Seq(start.tokenizer, model=start.model, pad_to_multiple_of=data.pad_to_multiple_of)
    if data.padding == "longest":
        return to_longest
    pad, sources, targets = start.tokenizer.pad_token_id, data.max_source_tokens, data.max_target_tokens

    def to_maximum(features: list[Feature]) -> dict[str, torch.Tensor]:
        return to_longest(
            [
                {
                    "input_ids": row["input_ids"] + [pad] * (sources - len(row["input_ids"])),
                    "attention_mask": [int(i < len(row["input_ids"])) for i in range(sources)],
                    "labels": row["labels"] + [-100] * (targets - len(row["labels"])),
                }
                for row in features
            ]
        )

    return to_maximum
