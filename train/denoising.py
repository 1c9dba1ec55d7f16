"""The first of two stages: learn to restore noised text, so that cross-attention and LM head are warm for the second.

Knows how unlabelled text becomes rows, and the course of the stage. The noise itself is `train/noise.py`'s; the
trainer and its arguments are those of fine-tuning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from train.config import DenoisingConfig, RunConfig
from train.data import FORMATS, DataError, document_key, load_file, suffix_of
from train.noise import infill, permute, split_sentences
from train.trainer import assemble_trainer
from train.warm_start import WarmStart, end_id, load_weights, start_id

FOLDER = "denoising"
BEST = "best"


class NoisedTexts(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows whose noise is new in every epoch, and the same for the same seed, epoch and row: in any order, any process.

    A row is `input_ids` (noised, with start and end token) and `labels` (the text in its order, with the end token).
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DenoisingConfig) -> None:
        if tokenizer.mask_token_id is None:
            raise DataError(f"the tokenizer {tokenizer.name_or_path} has no mask token, which denoising needs")
        self.rows = rows
        self.mask_id: int = tokenizer.mask_token_id
        self.start_id, self.end_id = start_id(tokenizer), end_id(tokenizer)
        self.config = config
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer's loader before an epoch, also when it resumes within one."""
        self.epoch = epoch

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text before noise: what batches are grouped by."""
        return list(self.rows["length"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sentences: list[list[int]] = self.rows[index]["sentences"]
        rng = np.random.default_rng((self.config.seed, self.epoch, index))
        ordered: Sequence[Sequence[int]] = permute(sentences, rng) if self.config.permute_sentences else sentences
        tokens = [token for sentence in ordered for token in sentence]
        noised = infill(tokens, self.mask_id, rng, self.config.mask_share, self.config.mean_span)
        labels = [token for sentence in sentences for token in sentence]
        return {"input_ids": [self.start_id, *noised, self.end_id], "labels": [*labels, self.end_id]}


def denoise(
    config: RunConfig, start: WarmStart, held_out: Collection[str] = (), resume: bool = False
) -> dict[str, Any]:
    """Train `start.model` on noised text and leave it with the weights of the best checkpoint of the stage.

    Args:
        held_out: keys of documents (`document_key`) that must not be learnt from: validation and test of the run.
        resume: go on from the newest checkpoint of the stage; a stage that has ended is not run again.

    Returns:
        The record of the stage, which `output_dir/denoising/best/run.json` holds too.

    Raises:
        DataError: the texts cannot be read, or none is left.
    """
    stage, folder = config.denoising, Path(config.output_dir) / FOLDER
    best = folder / BEST
    if not (resume and (best / "run.json").exists()):
        _train(config, start, held_out, get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None)
    # From the file in either case: a run that goes on later starts its second stage from the very same weights.
    load_weights(start.model, best)
    record: dict[str, Any] = json.loads((best / "run.json").read_text(encoding="utf-8"))
    loss = record["best_metric"]
    print(f"denoising: {record['rows']} rows of {stage.name}, loss on texts kept aside {loss:.3f}", flush=True)
    return record


def _train(config: RunConfig, start: WarmStart, held_out: Collection[str], checkpoint: str | None) -> None:
    stage, best = stage_config(config), Path(config.output_dir) / FOLDER / BEST
    kept, aside, dropped = read_texts(config.denoising, held_out)
    rows = {name: text_rows(texts, start.tokenizer, config.denoising) for name, texts in (("t", kept), ("v", aside))}
    set_seed(config.denoising.seed)
    trainer = assemble_trainer(
        start,
        NoisedTexts(rows["t"], start.tokenizer, config.denoising),
        NoisedTexts(rows["v"], start.tokenizer, config.denoising),
        eval_pairs=(),
        config=stage,
    )
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "eval_loss", False
    trainer.args.max_steps = config.denoising.steps or -1
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(best))
    if trainer.is_world_process_zero():
        record = {
            "config": dataclasses.asdict(config.denoising),
            "texts": len(kept),
            "rows": len(rows["t"]),
            "dropped": dropped,
            "train": result.metrics,
            "best_metric": trainer.state.best_metric,
            "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
            "log": trainer.state.log_history,
        }
        (best / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def stage_config(config: RunConfig) -> RunConfig:
    """The run as its first stage sees it: the stage's own optimisation, the rest of the run's."""
    stage = config.denoising
    return dataclasses.replace(
        config,
        output_dir=str(Path(config.output_dir) / FOLDER),
        optim=dataclasses.replace(
            config.optim,
            epochs=stage.epochs,
            batch_size=stage.batch_size,
            gradient_accumulation=stage.gradient_accumulation,
            learning_rate=stage.learning_rate,
            new_weights_learning_rate=stage.new_weights_learning_rate,
            warmup_steps=stage.warmup_steps,
            label_smoothing=0.0,
            r_drop_alpha=0.0,
            seed=stage.seed,
        ),
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


def text_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DenoisingConfig) -> Dataset:
    """Columns `sentences` (token ids, no special ones) and `length`; with two more a row is at most `max_tokens`.

    A text is packed into as many rows as it needs, whole sentences each; a sentence of more tokens than a row is cut.
    """
    features = Features({"sentences": List(List(Value("int32"))), "length": Value("int32")})

    def rows(batch: Mapping[str, list[str]]) -> dict[str, list[Any]]:
        packed = [row for text in batch["text"] for row in _pack(text, tokenizer, config.max_tokens - 2)]
        return {"sentences": packed, "length": [sum(map(len, row)) for row in packed]}

    table = Dataset.from_dict({"text": list(texts)})
    return table.map(
        rows,
        batched=True,
        remove_columns=["text"],
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="denoising: texts to rows",
    )


def _pack(text: str, tokenizer: PreTrainedTokenizerBase, room: int) -> list[list[list[int]]]:
    rows: list[list[list[int]]] = []
    left = 0
    encoded = tokenizer(split_sentences(text), add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[at : at + room] for ids in encoded for at in range(0, len(ids), room)]
    for ids in pieces:
        if len(ids) > left:
            rows.append([])
            left = room
        rows[-1].append(ids)
        left -= len(ids)
    return rows
