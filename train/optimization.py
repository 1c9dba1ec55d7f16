"""What a step computes and in which precision: the loss and the optimiser.

Knows parameters and tokens. Does not know batches, processes or checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import Seq2SeqLMOutput

from app.engine.kernels import has_bfloat16
from train.config import OptimConfig
from train.warm_start import WarmStart


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the device computes in it, fp16 on other CUDA devices, else fp32.

    A CPU without bf16 instructions emulates them, many times slower than fp32.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if has_bfloat16() else "fp32"


def slow_attention(model: torch.nn.Module) -> list[str]:
    """Why attention would not run on the fast kernels of `scaled_dot_product_attention`, a sentence a reason."""
    reasons = []
    for side in ("encoder", "decoder"):
        config = getattr(model.config, side, None)
        if config is None:
            continue
        if config._attn_implementation != "sdpa":
            reasons.append(f"{side}: attention runs as {config._attn_implementation!r}, not as SDPA")
        for name in ("attention_probs_dropout_prob", "attention_dropout"):
            if getattr(config, name, 0.0):
                reasons.append(
                    f"{side}: {name} is {getattr(config, name)}, which on a CPU keeps SDPA off its fast kernel; "
                    "model.attention_dropout=0.0 is the default"
                )
    return reasons


def build_optimizer(start: WarmStart, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW in four groups: warm and new weights, each with and without decay (none on biases and norms)."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in start.model.named_parameters():
        if not parameter.requires_grad:
            continue
        groups.setdefault((name in start.new_weights, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": optim.new_weights_learning_rate if new else optim.learning_rate,
                "weight_decay": optim.weight_decay if decay else 0.0,
            }
            for (new, decay), parameters in groups.items()
        ],
        fused=optim.fused_adamw,
    )


def smoothed_cross_entropy(label_smoothing: float) -> Any:
    """The loss of a batch as Trainer wants it: a sum over tokens divided by the tokens of the accumulated batch.

    So accumulating 4 batches equals one batch of 4 times the rows, however the tokens fall.
    """

    def loss(
        outputs: Seq2SeqLMOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        logits = outputs.logits  # [B, T, V]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=label_smoothing, reduction="sum"
        )
        return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())

    return loss
