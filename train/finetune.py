"""Fine-tune a warm-started encoder-decoder: `python -m train finetune --config FILE [key=value ...]`.

Knows optimisation, checkpoints and evaluation by generation while training. Does not export: `train export` does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from app.engine.linear import bfloat16_is_fast
from train.config import EvalConfig, OptimConfig, RunConfig
from train.data import Pair, data_hash, format_preflight, preflight, read_splits, tokenise
from train.metrics import rouge
from train.tokenizer_pair import AnyTokenizer
from train.warm_start import WarmStart, fit_limits, source_limit, warm_start

BEST = "best"


def finetune(config: RunConfig, resume: bool = False) -> Path:
    """Train, keep the checkpoint with the best ROUGE-2 on validation, and save it to `output_dir/best`.

    Args:
        resume: go on from the newest checkpoint in `output_dir`; weights, optimiser, schedule and random state.

    Returns:
        The folder of the best model: safetensors, tokenizer, and `run.json` (settings, data hashes, log).
    """
    set_seed(config.optim.seed)
    start = warm_start(config.model, config.generation)
    fit_limits(start.model, config.data)
    splits, reports = preflight(read_splits(config.data), start.tokenizer, config.data)
    print(format_preflight(reports, config.data), flush=True)
    trainer = build_trainer(start, splits["train"], splits["validation"], config)
    checkpoint = get_last_checkpoint(config.output_dir) if resume and Path(config.output_dir).is_dir() else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    best = Path(config.output_dir) / BEST
    trainer.save_model(str(best))
    (best / "run.json").write_text(
        json.dumps(
            {
                "config": config.to_dict(),
                "data": {name: {"rows": len(pairs), "sha256": data_hash(pairs)} for name, pairs in splits.items()},
                "preflight": {name: dataclasses.asdict(report) for name, report in reports.items()},
                "train": result.metrics,
                "best_metric": trainer.state.best_metric,
                "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
                "log": trainer.state.log_history,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    return best


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


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the device computes in it, fp16 on other CUDA devices, else fp32.

    A CPU without bf16 instructions emulates them, many times slower than fp32.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if bfloat16_is_fast() else "fp32"


def build_optimizer(start: WarmStart, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW in four groups: warm and new weights, each with and without decay (none on biases and norms)."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in start.model.named_parameters():
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
        fused=True,
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


@torch.inference_mode()
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
        ids = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config)
        for i, text in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            summaries[i] = text
    return summaries
