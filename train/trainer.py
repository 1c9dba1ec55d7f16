"""transformers' Trainer for summarisation: its arguments, its data, and evaluation by generation while training.

Does not know where the data come from, nor what a run leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from train.config import EvalConfig, RunConfig
from train.data import Pair, tokenise
from train.generation import generate_summaries
from train.metrics import rouge
from train.optimization import build_optimizer, resolve_precision, smoothed_cross_entropy
from train.warm_start import WarmStart


class SummarizationTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer whose evaluation writes summaries and scores them against the raw references."""

    def __init__(self, *args: Any, eval_pairs: Sequence[Pair], eval_config: EvalConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_pairs = eval_pairs
        self.eval_config = eval_config

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The usual loss, and ROUGE: best-checkpoint selection reads `eval_rouge2`."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        predictions = generate_summaries(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            [pair.document for pair in self.eval_pairs],
            batch_size=self.eval_config.batch_size,
            num_beams=self.eval_config.num_beams,
        )
        scores = rouge(predictions, [pair.references for pair in self.eval_pairs])
        output.metrics.update({f"{metric_key_prefix}_{name}": round(value, 3) for name, value in scores.items()})
        return output


def build_trainer(
    start: WarmStart, train_pairs: Sequence[Pair], eval_pairs: Sequence[Pair], config: RunConfig
) -> SummarizationTrainer:
    """Everything of a run but the run: arguments, optimiser, collator, loss."""
    train_pairs = train_pairs[: config.data.max_train_rows]
    eval_pairs = eval_pairs[: config.eval.rows]
    return SummarizationTrainer(
        model=start.model,
        args=training_arguments(config),
        train_dataset=tokenise(train_pairs, start.tokenizer, config.data),
        eval_dataset=tokenise(eval_pairs, start.tokenizer, config.data),
        # Pads to the longest of the batch, and shifts the labels into decoder inputs.
        data_collator=DataCollatorForSeq2Seq(start.tokenizer, model=start.model),
        processing_class=start.tokenizer,
        optimizers=(build_optimizer(start, config.optim), None),
        compute_loss_func=smoothed_cross_entropy(config.optim.label_smoothing),
        eval_pairs=eval_pairs,
        eval_config=config.eval,
    )


def training_arguments(config: RunConfig) -> Seq2SeqTrainingArguments:
    """The Trainer's arguments for this run; no network, no tracker unless one is asked for by its own variables."""
    optim, precision = config.optim, resolve_precision(config.optim.precision)
    strategy = "epoch" if config.eval.every_steps is None else "steps"
    return Seq2SeqTrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=optim.epochs,
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=config.eval.batch_size,
        gradient_accumulation_steps=optim.gradient_accumulation,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup_steps,
        max_grad_norm=optim.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        eval_strategy=strategy,
        eval_steps=config.eval.every_steps,
        save_strategy=strategy,
        save_steps=config.eval.every_steps or 500,
        save_total_limit=config.eval.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rouge2",
        greater_is_better=True,
        logging_steps=20,
        report_to="none",
        seed=optim.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Said outright: without it, processes on CPUs are not joined, and each trains a model of its own.
        use_cpu=not torch.accelerator.is_available(),
    )
