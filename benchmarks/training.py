"""Examples a second of the original recipe and of this one, on the same rows: `python -m benchmarks.training`.

The recipe of the original notebook pads every source to 512 tokens and every target to 128, takes 16 rows a batch as
they come, and drops attention weights. What this repository does instead is added one part at a time. Every recipe
takes whole training steps (forward, backward, clipping, AdamW) of the Trainer over the same rows, in turn, in rounds of
fresh rows; precision, model and learning settings are the same.

    python -m benchmarks.training --base PATH --data PATH [--output FILE]

Without a base and data it runs a tiny random model over random words: that shows that it works, and no speed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

from benchmarks.report import Report, significant
from train.arguments import batch_plan
from train.config import DataConfig, RunConfig, config_from_dict
from train.data import Pair, read_split, tokenise
from train.loading import Rows, collator
from train.optimization import resolve_precision
from train.trainer import SummarizationTrainer, build_trainer
from train.warm_start import warm_start

ORIGINAL: dict[str, dict[str, Any]] = {
    "model": {"attention_dropout": 0.1},
    "data": {"padding": "max_length"},
    "optim": {"batch_size": 16, "grouping": "none"},
}
# Each adds to the one before.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "original": ORIGINAL,
    "no attention dropout": {**ORIGINAL, "model": {"attention_dropout": 0.0}},
    "padded to the batch's longest": {
        **ORIGINAL,
        "model": {"attention_dropout": 0.0},
        "data": {"padding": "longest"},
    },
    "length-grouped token budget": {
        "model": {"attention_dropout": 0.0},
        "data": {"padding": "longest"},
        "optim": {"grouping": "length"},
    },
}
OURS = "length-grouped token budget"


@dataclass
class Contender:
    """One recipe, ready to take steps, and what it took."""

    trainer: SummarizationTrainer
    model: torch.nn.Module
    rows: Rows
    collate: Any
    speeds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    padded: int = 0
    steps: int = 0

    def step(self, rows: list[int]) -> None:
        """One optimiser step over one batch, as the Trainer takes it."""
        batch = self.collate([self.rows[row] for row in rows])
        self.padded += batch["input_ids"].numel() + batch["labels"].numel()
        self.steps += 1
        items = (batch["labels"] != -100).sum().to(self.trainer.args.device)
        self.trainer.training_step(self.model, batch, items)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def run(self, batches: list[list[int]]) -> None:
        """A step for each batch, timed together."""
        began = time.perf_counter()
        for rows in batches:
            self.step(rows)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        self.seconds += took
        self.speeds.append(sum(map(len, batches)) / took)


def contender(config: RunConfig, pairs: Sequence[Pair], tokens: Dataset) -> Contender:
    """Warm start and Trainer of a recipe."""
    set_seed(config.optim.seed)
    start = warm_start(config.model, config.generation)
    trainer = build_trainer(start, pairs[:2], pairs[:2], config)
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    return Contender(trainer, model, Rows(tokens), collator(start, config.data))


def settings(name: str, base: str, data: DataConfig, folder: str, args: argparse.Namespace) -> RunConfig:
    """The configuration of a recipe."""
    recipe = RECIPES[name]
    optim = {"precision": args.precision, **recipe["optim"]}
    if name == OURS:
        optim["batch_tokens"] = args.batch_tokens
    table: dict[str, Any] = {
        "name": "benchmark",
        "output_dir": folder,
        "model": {"encoder": base, "decoder": base, "share_embeddings": True, **recipe["model"]},
        "data": {
            "path": data.path,
            "max_source_tokens": data.max_source_tokens,
            "max_target_tokens": data.max_target_tokens,
            **recipe["data"],
        },
        "optim": optim,
    }
    return config_from_dict(table)


def synthetic(folder: Path) -> tuple[str, list[Pair]]:
    """A tiny random BERT, and pairs whose lengths spread as those of dialogues do."""
    words = [f"w{i}" for i in range(500)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=512,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    rng = random.Random(0)

    def text(mean: float, most: int) -> str:
        return " ".join(rng.choices(words, k=min(most, max(3, int(rng.lognormvariate(np.log(mean), 0.5))))))

    return str(folder), [Pair(str(i), text(160, 500), (text(22, 120),)) for i in range(600)]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return what stands in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="checkpoint folder or hub id; by default a tiny random one")
    parser.add_argument("--data", help="folder or hub id; by default random words")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--batch-tokens", type=int, default=8192, help="token budget; 16 padded rows have 10240")
    parser.add_argument("--batches", type=int, default=5, help="token-budget batches whose rows are trained on")
    parser.add_argument("--rounds", type=int, default=5, help="at most one a batch")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report("Training: examples a second", device)
    with tempfile.TemporaryDirectory() as folder:
        base, pairs = synthetic(Path(folder) / "base") if not (args.base and args.data) else (args.base, [])
        data = DataConfig(path=args.data or "synthetic")
        pairs = pairs or read_split(data, "train")
        results = measure(report, base, data, pairs, folder, args)
    report.finish(results, args.output)
    return results


def measure(
    report: Report, base: str, data: DataConfig, pairs: list[Pair], folder: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of every recipe in turn over the same rows."""
    configs = {name: settings(name, base, data, folder, args) for name in RECIPES}
    tokens = tokenise(pairs, warm_start(configs[OURS].model, configs[OURS].generation).tokenizer, data)
    lengths = [np.asarray([len(ids) for ids in tokens[column]], np.int64) for column in ("input_ids", "labels")]
    contenders = {name: contender(config, pairs, tokens) for name, config in configs.items()}
    planned = batch_plan(configs[OURS], processes=1).batches(lengths[0], lengths[1], epoch=0)
    for each in contenders.values():
        each.run([planned[-1][:8]])  # memory, kernels, the optimiser's state
        each.speeds, each.seconds, each.padded, each.steps = [], 0.0, 0, 0
    grouped = planned[: args.batches]
    rows = [row for batch in grouped for row in batch]
    random.Random(0).shuffle(rows)
    sixteens = [rows[at : at + 16] for at in range(0, len(rows), 16)]
    rounds = min(args.rounds, len(grouped), len(sixteens))
    for number in range(rounds):
        # In turn, and every other time backwards: a machine that slows down slows all.
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            contenders[name].run((grouped if name == OURS else sixteens)[number::rounds])
            print(f"round {number + 1}, {name}: {contenders[name].speeds[-1]:.2f} rows/s", file=sys.stderr, flush=True)
    return results_of(report, contenders, len(rows), sum(int(length[rows].sum()) for length in lengths), args)


def results_of(
    report: Report, contenders: dict[str, Contender], rows: int, real: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The table and the JSON."""
    table, found = [], {}
    for name, each in contenders.items():
        ratio = contenders["original"].seconds / each.seconds
        table.append(
            [
                name,
                f"{rows / each.steps:.1f}",
                f"{each.padded / real:.2f}",
                f"{each.seconds:.1f}",
                f"{rows / each.seconds:.2f}",
                f"{min(each.speeds):.2f} to {max(each.speeds):.2f}",
                f"{ratio:.2f}",
            ]
        )
        found[name] = {
            "rows_a_step": significant(rows / each.steps),
            "padded_tokens_per_token": significant(each.padded / real),
            "seconds": significant(each.seconds),
            "examples_per_second": significant(rows / each.seconds),
            "examples_per_second_of_rounds": [significant(speed) for speed in each.speeds],
            "times_original": significant(ratio),
        }
    headers = ["recipe", "rows a step", "padded tokens a token", "seconds", "examples a second", "of rounds", "times"]
    report.table(headers, table)
    precision = resolve_precision(args.precision)
    kept = "MALLOC_TRIM_THRESHOLD_" in os.environ
    report.say(
        f"Every recipe trained on the same {rows} rows, in turn; {precision}; token budget {args.batch_tokens}. Times: "
        "the original's examples a second. Each recipe adds to the one above it. Rounds of the last differ because its "
        f"batches of short texts have more rows. Freed memory "
        f"{'stays with the process, as `make train` sets it' if kept else 'goes back to the system'}."
    )
    return {
        "model": Path(args.base).parent.name if args.base else "tiny random BERT",
        "data": Path(args.data).name if args.data else "random words",
        "precision": precision,
        "batch_tokens": args.batch_tokens,
        "rows": rows,
        "recipes": found,
    }


if __name__ == "__main__":
    main()
