"""The first of two stages: learn to restore noised text, so that cross-attention and LM head are warm for the second.

Knows how unlabelled text becomes rows, and the course of the stage. The noise itself is `train/noise.py`'s; the
trainer and its arguments are those of fine-tuning.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import DataLoader

from train.arguments import batch_plan, training_arguments
from train.batching import BatchPlan, ProcessBatches
from train.config import DenoisingConfig, RunConfig
from train.data import FORMATS, DataError, document_key, load_file, suffix_of
from train.loading import collator, epoch_loader
from train.noise import infill, permute, split_sentences
from train.provenance import sources
from train.r_drop import loss_of
from train.records import BEST
from train.resuming import seconds_of
from train.tokenizer_pair import AnyTokenizer, label_ids
from train.trainer import SummarizationTrainer
from train.warm_start import WarmStart

FOLDER = "denoising"
RECORD = "run.json"
# What `[denoising]` says in place of `[optim]`.
_OPTIMISATION = (
    "epochs",
    "max_steps",
    "batch_size",
    "batch_tokens",
    "gradient_accumulation",
    "learning_rate",
    "new_weights_learning_rate",
    "warmup_steps",
    "seed",
)
# With the space before it; a last space belongs to the last word.
_WORD = re.compile(r"\s*\S+(?:\s+$)?|\s+$")


class NoisedTexts(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows whose noise is new in every epoch, and the same for the same seed, epoch and row: in any order, any process.

    A row is `input_ids` (noised, with the special tokens of a source) and `labels` (the text in its order).
    `~i` is row `i` with labels that the loss ignores (`ProcessBatches`).
    """

    def __init__(self, rows: Dataset, tokenizer: AnyTokenizer, config: DenoisingConfig) -> None:
        if tokenizer.mask_token_id is None:
            raise DataError(f"the tokenizer {tokenizer.name_or_path} has no mask token, which denoising needs")
        self.rows = rows
        self.mask_id: int = tokenizer.mask_token_id
        *self.before, self.after = tokenizer("")["input_ids"]
        self.config = config
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the noise of this epoch from now on."""
        self.epoch = epoch

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text before noise: what batches are grouped by."""
        return list(self.rows["length"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        number = index if index >= 0 else ~index
        row = self.rows[number]
        sentences: list[list[int]] = row["sentences"]
        rng = np.random.default_rng((self.config.seed, self.epoch, number))
        ordered: Sequence[Sequence[int]] = permute(sentences, rng) if self.config.permute_sentences else sentences
        tokens = [token for sentence in ordered for token in sentence]
        noised = infill(tokens, self.mask_id, rng, self.config.mask_share, self.config.mean_span)
        labels = row["labels"] if index >= 0 else [-100] * len(row["labels"])
        # Masks of spans of no token make a row longer.
        noised = noised[: self.config.max_tokens - len(self.before) - 1]
        return {"input_ids": [*self.before, *noised, self.after], "labels": labels}


class NoisedBatches(ProcessBatches):
    """Batches that tell their rows, too, which epoch it is; grouped by the lengths of the texts before noise.

    Not the loader: a run that resumes within an epoch has another one, and says the epoch to the batches alone.
    """

    def __init__(self, rows: NoisedTexts, plan: BatchPlan, processes: int, rank: int) -> None:
        sources = targets = np.asarray(rows.lengths, np.int64)
        if plan.tokens is not None and plan.padding.multiple > 1:
            # Special tokens count where one more may be padded to a whole multiple more.
            sources = np.minimum(sources + len(rows.before) + 1, rows.config.max_tokens)
            targets = np.asarray([len(ids) for ids in rows.rows["labels"]], np.int64)
        super().__init__(plan, sources, targets, processes, rank)
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before it iterates, also when it resumes within an epoch."""
        super().set_epoch(epoch)
        self.rows.set_epoch(epoch)


class DenoisingTrainer(SummarizationTrainer):
    """The Trainer of fine-tuning on noised texts; without pairs it evaluates by the loss alone."""

    def loader(self, rows: NoisedTexts, plan: BatchPlan) -> DataLoader[Any]:
        """Batches of this process; those of texts kept aside have the noise of epoch 0 every time."""
        batches = NoisedBatches(rows, plan, self.args.world_size, self.args.process_index)
        pin = self.args.dataloader_pin_memory
        workers = self.config.optim.loader_workers if rows is self.train_dataset else 0
        return epoch_loader(rows, batches, self.data_collator, pin, workers)


def denoise(
    config: RunConfig, start: WarmStart, held_out: Collection[str] = (), checkpoint: Path | None = None
) -> Path:
    """Train `start.model` on noised text, and save its best checkpoint to `output_dir/best`.

    Args:
        config: the run as `stage_config` makes it.
        held_out: keys of documents (`document_key`) that must not be learnt from: validation and test of the run.
        checkpoint: a checkpoint of the stage to go on from.

    Returns:
        The folder of the best model, with a `run.json`.

    Raises:
        DataError: the texts cannot be read, or none is left.
    """
    stage = config.denoising
    kept, aside, dropped = read_texts(stage, held_out)
    rows, aside_rows = (
        NoisedTexts(text_rows(texts, start.tokenizer, stage, workers), start.tokenizer, stage)
        for texts, workers in ((kept, config.optim.loader_workers), (aside, 0))
    )
    args = training_arguments(config)
    args.metric_for_best_model, args.greater_is_better = "eval_loss", False
    trainer = DenoisingTrainer(
        model=start.model,
        args=args,
        train_dataset=rows,
        eval_dataset=aside_rows,
        data_collator=collator(start, config.data),
        processing_class=start.tokenizer,
        compute_loss_func=loss_of(config.optim),
        start=start,
        eval_pairs=(),
        config=config,
        plan=batch_plan(config, args.world_size),
    )
    trainer.seconds_before = seconds_of(checkpoint)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best = Path(config.output_dir) / BEST
    trainer.save_model(str(best))
    if trainer.is_world_process_zero():
        only_texts = dataclasses.replace(config, data=dataclasses.replace(config.data, weight=0.0, extra=()))
        record = {
            "config": config.to_dict(),
            "texts": len(kept),
            "rows": len(rows),
            "dropped": dropped,
            "sources": sources(only_texts),
            "train": result.metrics | {"train_runtime": round(trainer.seconds(), 1)},
            "best_metric": trainer.state.best_metric,
            "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
            "log": trainer.state.log_history,
        }
        (best / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"denoising: {len(rows)} rows, loss on texts kept aside {trainer.state.best_metric:.3f}", flush=True)
    trainer.accelerator.wait_for_everyone()
    return best


def stage_config(config: RunConfig) -> RunConfig:
    """The run as its first stage sees it: the stage's own optimisation, the rest of the run's."""
    stage = config.denoising
    kept = {name: getattr(stage, name) for name in _OPTIMISATION}
    return dataclasses.replace(
        config,
        output_dir=str(Path(config.output_dir) / FOLDER),
        data=dataclasses.replace(
            config.data, max_source_tokens=stage.max_tokens, max_target_tokens=stage.max_tokens, streaming=False
        ),
        optim=dataclasses.replace(config.optim, **kept, label_smoothing=0.0, r_drop_alpha=0.0),
        eval=dataclasses.replace(config.eval, every_steps=stage.every_steps),
    )


def read_texts(config: DenoisingConfig, held_out: Collection[str] = ()) -> tuple[list[str], list[str], int]:
    """Texts to learn from, texts kept aside, and how many were dropped because the run validates or tests on them.

    Files are grouped by source, so their rows are shuffled (by `config.seed`) before any is counted off.

    Raises:
        DataError: no such file or column, a row that is no text, or too few texts.
    """
    path = Path(str(config.path))
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if suffix_of(file) in FORMATS)
    if not files:
        raise DataError(f"denoising.path: {path} is no file, and no folder with {', '.join(FORMATS)}")
    texts: list[str] = []
    for file in files:
        rows = load_file(file, "train")
        if config.text_column not in rows.column_names:
            raise DataError(f"{file} has no column {config.text_column}; it has {', '.join(rows.column_names)}")
        texts += rows[config.text_column]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: {config.text_column} must be a text in every row")
    order = np.random.default_rng(config.seed).permutation(len(texts)).tolist()
    texts = [texts[i] for i in order if texts[i].strip()][: config.max_texts]
    kept = [text for text in texts if document_key(text) not in held_out] if held_out else texts
    if len(kept) <= config.held_out:
        raise DataError(f"{path} has {len(kept)} texts to learn from; denoising.held_out keeps {config.held_out} aside")
    return kept[config.held_out :], kept[: config.held_out], len(texts) - len(kept)


def text_rows(texts: Sequence[str], tokenizer: AnyTokenizer, config: DenoisingConfig, workers: int = 0) -> Dataset:
    """Columns `sentences` (source ids, no special ones), `labels` (as of a summary) and `length`.

    A text is packed into as many rows as it needs, whole sentences each, so that with its special tokens a row has at
    most `max_tokens`; a sentence of more is cut between words, and a word of more loses its end.
    """
    ids = List(Value("int32"))
    features = Features({"sentences": List(ids), "labels": ids, "length": Value("int32")})
    room = config.max_tokens - len(tokenizer("")["input_ids"])

    def rows(batch: Mapping[str, list[str]]) -> dict[str, list[Any]]:
        packed = [row for text in batch["text"] for row in _pack(text, tokenizer, room)]
        return {
            "sentences": [[ids for _, ids in row] for row in packed],
            "labels": label_ids(tokenizer, ["".join(text for text, _ in row) for row in packed], config.max_tokens),
            "length": [sum(len(ids) for _, ids in row) for row in packed],
        }

    return Dataset.from_dict({"text": list(texts)}).map(
        rows,
        batched=True,
        remove_columns=["text"],
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        num_proc=workers or None,
        desc="denoising: texts to rows",
    )


Sentence = tuple[str, list[int]]


def _pack(text: str, tokenizer: AnyTokenizer, room: int) -> list[list[Sentence]]:
    rows: list[list[Sentence]] = []
    left = 0
    for piece, ids in _that_fit(split_sentences(text), tokenizer, room):
        if len(ids) > left:
            rows.append([])
            left = room
        rows[-1].append((piece, ids))
        left -= len(ids)
    return rows


def _that_fit(pieces: Sequence[str], tokenizer: AnyTokenizer, room: int) -> Iterator[Sentence]:
    """Each piece with its ids, in order; one of more than `room` tokens as its halves, or theirs."""
    encoded = tokenizer(list(pieces), add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
    for piece, ids in zip(pieces, encoded, strict=True):
        words = _WORD.findall(piece)
        if len(ids) > room and len(words) > 1:
            half = len(words) // 2
            yield from _that_fit(["".join(words[:half]), "".join(words[half:])], tokenizer, room)
        elif ids:  # of a space alone there are none
            yield piece, ids[:room]
