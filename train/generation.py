"""Summaries of many documents by transformers' own `generate`.

The reference that training scores itself by. Serving has an engine of its own, `app/engine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from train.tokenizer_pair import AnyTokenizer
from train.warm_start import source_limit


@torch.no_grad()  # not inference_mode: sharded weights that it gathers could not be trained on again
def generate_summaries(
    model: PreTrainedModel,
    tokenizer: AnyTokenizer,
    documents: Sequence[str],
    batch_size: int,
    num_beams: int | None = None,
) -> list[str]:
    """Summaries by `model.generate`, in input order; batches hold documents of like length."""
    model.eval()
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    if num_beams is not None:
        config.num_beams = num_beams
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    summaries = [""] * len(documents)
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        batch = tokenizer(
            [documents[i] for i in rows],
            truncation=True,
            max_length=source_limit(model),
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
            synced_gpus=False,  # processes have other documents, and need not wait for each other
        )
        for i, text in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            summaries[i] = text
    return summaries
