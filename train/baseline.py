"""Summaries by `generate`, for a model that came whole (BART, PEGASUS) and that the engine has no network for.

Such a model is fine-tuned and scored by the same commands as a mix, to be compared with it. It is not exported, and
its speed says nothing of the engine's. Knows loading and batches. Does not know scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from train.generation import generate_summaries
from train.warm_start import load_model, source_limit

BATCH_SIZE = 8


def decode_baseline(
    folder: Path,
    documents: Sequence[str],
    on_finished: Callable[[int], None] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[list[str], int]:
    """Summaries in input order by the model's own settings, and how many documents were cut to its source limit.

    Raises:
        WarmStartError: the folder lacks weights that the model needs.
    """
    model, tokenizer = load_model(folder)
    model = model.to(device=device, dtype=getattr(torch, dtype))
    limit = source_limit(model)
    lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in documents]
    summaries = [""] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: -lengths[i])
    for at in range(0, len(order), BATCH_SIZE):
        rows = order[at : at + BATCH_SIZE]
        found = generate_summaries(model, tokenizer, [documents[i] for i in rows], BATCH_SIZE)
        for i, text in zip(rows, found, strict=True):
            summaries[i] = text.strip()
        if on_finished is not None:
            on_finished(at + len(rows))
    return summaries, sum(length > limit for length in lengths)
