"""R-Drop (Liang et al. 2021, arXiv:2106.14448): two passes with their own dropout should say the same.

A batch holds every row twice, so that one pass of the model is both. Does not know the model or its Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import Seq2SeqLMOutput

from train.config import OptimConfig
from train.optimization import smoothed_cross_entropy
from train.streaming import Feature


def loss_of(optim: OptimConfig) -> Any:
    """The loss that a run asks for: smoothed cross-entropy, with R-Drop where its weight is not 0."""
    loss = smoothed_cross_entropy(optim.label_smoothing)
    return with_r_drop(loss, optim.r_drop_alpha) if optim.r_drop_alpha else loss


def twice(collator: Callable[[list[Feature]], Any]) -> Callable[[Sequence[Feature]], Any]:
    """A collator that puts each row into the batch twice: the first halves come first."""
    return lambda features: collator([feature.copy() for feature in (*features, *features)])


def with_r_drop(loss: Any, alpha: float) -> Any:
    """`loss` over both halves, and `alpha` times their symmetric KL divergence; both are means over tokens.

    It is half of the paper's sum, so that at `alpha` 0 it is the loss of the rows given once.
    """

    def both(
        outputs: Seq2SeqLMOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        first, second = outputs.logits.float().log_softmax(-1).chunk(2)  # [B, T, V] each
        kept = labels.chunk(2)[0] != -100
        # sum p (log p - log q) + sum q (log q - log p)
        divergence = ((first.exp() - second.exp()) * (first - second)).sum(-1)[kept].sum()
        tokens = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
        return loss(outputs, labels, num_items_in_batch) + alpha * divergence / 2 / tokens

    return both
