"""transformers' Trainer for summarisation: evaluation by generation, checkpoints for any number of processes.

Does not know where the data come from, nor what a run leaves behind.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from train.arguments import batch_plan, training_arguments
from train.batching import BatchPlan
from train.config import RunConfig
from train.data import Pair, tokenise
from train.generation import generate_summaries
from train.loading import collator, train_loader
from train.metrics import rouge
from train.optimization import build_optimizer
from train.r_drop import loss_of, twice
from train.ranking import CANDIDATES, collate_candidates, loss_of_candidates, ranked, with_candidates
from train.resuming import STEP, step_record
from train.sharding import (
    full_parameters,
    full_state,
    full_weights,
    load_full_optimizer_state,
    load_full_state,
    shard,
)
from train.streaming import StreamedBatches
from train.warm_start import WarmStart

# In each checkpoint: what made up a step.


class SeedEachProcess(TrainerCallback):
    """Dropout of a seed of its own in each process, else all would drop the same places.

    A run that resumes on as many processes reads the state of its generators; on another number, it starts from here.
    """

    def on_train_begin(self, args: Seq2SeqTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Batches do not depend on it: they have generators of their own."""
        torch.manual_seed(args.seed + 1_000_003 * state.global_step + args.process_index)


class SummarizationTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer with the batches of `train/batching.py`, whose evaluation writes summaries and scores them.

    Processes share the work of evaluation: each one writes summaries for its part of the rows, and all score them all,
    so that all agree on the best checkpoint.
    """

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        start: WarmStart,
        eval_pairs: Sequence[Pair],
        config: RunConfig,
        plan: BatchPlan,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, callbacks=[SeedEachProcess()], **kwargs)
        # cuDNN's attention is compiled for every new shape, for longer than a step takes, and batches have many shapes.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.start = start
        self.eval_pairs = eval_pairs
        self.config = config
        self.plan = plan
        self.seconds_before = 0.0  # of a run that goes on
        self._started = time.monotonic()
        self.sharded = config.optim.parallel == "fsdp" and self.args.world_size > 1
        if self.sharded:
            shard(self.model, self.args.device, torch.bfloat16 if self.args.bf16 else torch.float32)
            # The Trainer then leaves weights and gradients to the model, as if it had been sharded when it was loaded.
            self.is_distributed_loading_by_transformers = True

    def seconds(self) -> float:
        """How long the run has taken, with what it took before it was resumed."""
        return self.seconds_before + time.monotonic() - self._started

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process; accelerate would deal them out again."""
        return self.loader(self.train_dataset, self.plan)

    def loader(self, rows: Any, plan: BatchPlan) -> DataLoader[Any]:
        """Batches of this process as `plan` makes them of `rows`."""
        workers = self.config.optim.loader_workers
        return train_loader(rows, plan, self.data_collator, self.args.world_size, self.args.process_index, workers)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the rates of this run, over the weights as they are now: whole, or this process's parts."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.start, self.config.optim)
        return self.optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's own, but of a batch with candidates, which are ranked."""
        if CANDIDATES not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            return loss_of_candidates(
                self.accelerator.unwrap_model(model),
                inputs,
                self.compute_loss_func,
                self.config.ranking,
                self.config.generation.length_penalty,
                num_items_in_batch,
            )

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Loss a token over all rows, and ROUGE where there are pairs: best-checkpoint selection reads `eval_rouge2`.

        The Trainer's own loss is a mean over batches, and depends on their size and on the number of processes.
        """
        self.model.eval()
        with full_parameters(self.model) if self.sharded else nullcontext():
            scores = {"loss": self._token_loss(dataloader.dataset)}
            if self.eval_pairs:
                scores |= rouge(self.write_summaries(), [pair.references for pair in self.eval_pairs])
        # The loss is for comparing runs; a score has no third digit that means something.
        rows: Any = dataloader.dataset
        metrics = {
            f"{metric_key_prefix}_{name}": value if name == "loss" else round(value, 3)
            for name, value in scores.items()
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    @torch.no_grad()
    def _token_loss(self, rows: Dataset) -> float:
        plan = replace(self.plan, rows=self.config.eval.batch_size, tokens=None, per_step=1, grouped=True)
        loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self.loader(rows, plan):
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            loss = self.compute_loss_func(self.model(**inputs), labels, num_items_in_batch=1)
            loss_and_tokens += torch.stack([loss.double(), (labels != -100).sum().double()])
        total, tokens = self.accelerator.reduce(loss_and_tokens, "sum").tolist()
        return float(total / tokens)

    def write_summaries(self) -> list[str]:
        """Summaries of all validation documents, in every process. Of sharded weights: inside `full_parameters`."""
        processes, rank = self.args.world_size, self.args.process_index
        written = generate_summaries(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            [pair.document for pair in self.eval_pairs[rank::processes]],
            batch_size=self.config.eval.batch_size,
            num_beams=self.config.eval.num_beams,
        )
        if processes == 1:
            return written
        return in_order_of_rows(gather_object(written), processes)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Accumulated batches: sharded gradients are reduced after each, or every process would hold whole ones."""
        yield

    # Checkpoints hold whole tensors under the names of a plain model, sharded or not: any number of processes may read.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            step = step_record(self.config.optim, self.plan, self.seconds())
            (folder / STEP).write_text(json.dumps(step) + "\n", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model as `save_pretrained` writes it, by the first process."""
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        state = full_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded:
            state = full_state(self.optimizer.state_dict())
            if self.args.should_save:
                torch.save(state, Path(output_dir) / "optimizer.pt")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.sharded and checkpoint is not None:
            folder = Path(checkpoint)
            optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            load_full_optimizer_state(self.optimizer, optimizer)
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.sharded:
            load_full_state(self.model, load_file(Path(resume_from_checkpoint) / "model.safetensors"))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def in_order_of_rows(gathered: Sequence[str], processes: int) -> list[str]:
    """What all processes wrote, one behind the other, in the order of rows: process p had every P-th from p on."""
    count = len(gathered)
    order = [row for rank in range(processes) for row in range(rank, count, processes)]
    by_row = dict(zip(order, gathered, strict=True))
    return [by_row[row] for row in range(count)]


def build_trainer(
    start: WarmStart,
    train_pairs: Sequence[Pair],
    eval_pairs: Sequence[Pair],
    config: RunConfig,
    held_out: dict[str, list[Pair]] | None = None,
) -> SummarizationTrainer:
    """Everything of a run but the run: arguments, optimiser, batches, collator, loss.

    Args:
        train_pairs: not read where the training set is streamed.
        held_out: the other splits of a streamed training set, whose documents are not trained on.
    """
    eval_pairs = eval_pairs[: config.eval.rows]
    args = training_arguments(config)
    plan = batch_plan(config, args.world_size)
    collate = collator(start, config.data)
    train_dataset: Any
    if config.data.streaming:
        train_dataset = StreamedBatches(
            config.data, start.tokenizer, held_out or {}, plan, args.world_size, args.process_index
        )
    else:
        train_dataset = tokenise(train_pairs, start.tokenizer, config.data)
    if config.ranking.paths:
        longest = config.data.max_target_tokens
        train_dataset = with_candidates(train_dataset, train_pairs, start.tokenizer, config.ranking, longest)
        collate = collate_candidates(collate, config.data.pad_to_multiple_of)
        found = ranked(train_dataset, config.ranking)
        print(f"ranking: {found['candidates']} candidates of {found['documents']} documents", flush=True)
    return SummarizationTrainer(
        model=start.model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=tokenise(eval_pairs, start.tokenizer, config.data),
        data_collator=twice(collate) if config.optim.r_drop_alpha else collate,
        processing_class=start.tokenizer,
        compute_loss_func=loss_of(config.optim),
        start=start,
        eval_pairs=eval_pairs,
        config=config,
        plan=plan,
    )
