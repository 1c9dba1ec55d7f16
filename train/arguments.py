"""One run's settings as transformers' Trainer and `train/batching.py` want them.

Knows names and versions of settings. Does not know models or data.
"""

from __future__ import annotations

import torch
from transformers import Seq2SeqTrainingArguments

from train.batching import BatchPlan, Padding
from train.config import ConfigError, RunConfig
from train.optimization import resolve_precision


def training_arguments(config: RunConfig) -> Seq2SeqTrainingArguments:
    """The Trainer's arguments for this run; no tracker but that of `report_to`.

    Raises:
        ConfigError: fp16 without a CUDA device, or with sharding.
    """
    optim, precision = config.optim, resolve_precision(config.optim.precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("optim.precision = fp16 needs a CUDA device: loss scaling is for those; use bf16 or fp32")
    if precision == "fp16" and optim.parallel == "fsdp":
        raise ConfigError("optim.precision = fp16 is not supported with optim.parallel = fsdp; bf16 and fp32 are")
    strategy = "epoch" if config.eval.every_steps is None else "steps"
    return Seq2SeqTrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=config.eval.batch_size,
        gradient_accumulation_steps=optim.gradient_accumulation,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup_steps,
        max_grad_norm=optim.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=optim.gradient_checkpointing,
        # The reentrant kind neither sees unused weights nor keeps autocast.
        activation_checkpointing_kwargs={"use_reentrant": False} if optim.gradient_checkpointing else None,
        torch_compile=optim.torch_compile,
        torch_compile_backend=optim.compile_backend if optim.torch_compile else None,
        eval_strategy=strategy,
        eval_steps=config.eval.every_steps,
        save_strategy=strategy,
        save_steps=config.eval.every_steps or 500,
        save_total_limit=config.eval.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rouge2",
        greater_is_better=True,
        logging_steps=20,
        report_to=config.report_to,
        seed=optim.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Encoders come with weights that no summary passes (BERT's pooler): without it the second step would wait for
        # their gradients. The Trainer's own default changes with gradient checkpointing.
        ddp_find_unused_parameters=True,
        # Said outright: without it, processes on CPUs are not joined, and each trains a model of its own.
        use_cpu=not torch.accelerator.is_available(),
    )


def batch_plan(config: RunConfig, processes: int) -> BatchPlan:
    """How the rows of this run become batches."""
    data, optim = config.data, config.optim
    limits = (data.max_source_tokens, data.max_target_tokens)
    return BatchPlan(
        rows=optim.batch_size,
        tokens=optim.batch_tokens,
        per_step=processes * optim.gradient_accumulation,
        grouped=optim.grouping == "length",
        seed=optim.seed,
        padding=Padding(data.pad_to_multiple_of, limits if data.padding == "max_length" else None),
    )
