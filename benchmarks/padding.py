"""What padding costs for each way of grouping a training epoch: `python -m benchmarks.padding --data PATH --base PATH`.

No model runs: the work of a batch is counted as its padded source and target tokens, each weighed by the weights that
one token passes (for MiniLM2MiniLM 12.4 M a source token, with its cross-attention keys and values, and 25.8 M a target
token, with the LM head). Prints work, source tokens and target tokens, each over their unpadded amount.
"""

from __future__ import annotations

import argparse
import json
import random

import numpy as np

from train.batching import token_batches
from train.config import DataConfig
from train.data import read_split, tokenise
from train.warm_start import load_tokenizer

SOURCE_WEIGHTS, TARGET_WEIGHTS = 12.4, 25.8
MEGA_BATCHES = 50  # batches that are sorted together
BANDS = (1, 16, 32, 64, 128)  # tokens; 1 sorts by source length, then by target length
CELLS = ((8, 4), (16, 4), (16, 8), (32, 8), (32, 16))  # tokens of source and target


def padded(sources: list[int], targets: list[int], batch_size: int, band: int | None, seed: int) -> tuple[int, int]:
    """Padded source and target tokens of an epoch; no band is a random order."""
    order = list(range(len(sources)))
    random.Random(seed).shuffle(order)
    step = batch_size * MEGA_BATCHES
    if band is not None:
        order = [
            row
            for at in range(0, len(order), step)
            for row in sorted(order[at : at + step], key=lambda i: (sources[i] // band, targets[i]), reverse=True)
        ]
    return lengths_of([order[at : at + batch_size] for at in range(0, len(order), batch_size)], sources, targets)


def lengths_of(batches: list[list[int]], sources: list[int], targets: list[int]) -> tuple[int, int]:
    """Padded source and target tokens."""
    return (
        sum(len(rows) * max(sources[i] for i in rows) for rows in batches),
        sum(len(rows) * max(targets[i] for i in rows) for rows in batches),
    )


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="hub id, or a folder with one file a split")
    parser.add_argument("--base", required=True, help="checkpoint whose tokenizer counts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    args = parser.parse_args()
    config = DataConfig(path=args.data)
    rows = tokenise(read_split(config, "train"), load_tokenizer(args.base), config)
    sources, targets = [[len(ids) for ids in rows[column]] for column in ("input_ids", "labels")]
    work = SOURCE_WEIGHTS * sum(sources) + TARGET_WEIGHTS * sum(targets)
    results = []
    print(f"{'grouping':<22}{'work':>8}{'source':>8}{'target':>8}{'batches':>9}")

    def show(name: str, source: int, target: int, batches: int) -> None:
        result = {
            "grouping": name,
            "work": round((SOURCE_WEIGHTS * source + TARGET_WEIGHTS * target) / work, 3),
            "source": round(source / sum(sources), 3),
            "target": round(target / sum(targets), 3),
            "batches": batches,
        }
        results.append(result)
        print(f"{name:<22}{result['work']:>8}{result['source']:>8}{result['target']:>8}{batches:>9}")

    for band in (None, *BANDS):
        name = "rows, random" if band is None else f"rows, band {band}"
        show(name, *padded(sources, targets, args.batch_size, band, seed=0), -(-len(sources) // args.batch_size))
    for cell in CELLS:
        lengths = np.asarray(sources), np.asarray(targets)
        batches = token_batches(*lengths, args.batch_tokens, np.random.default_rng(0), cell)
        show(f"tokens, cell {cell[0]} x {cell[1]}", *lengths_of(batches, sources, targets), len(batches))
    settings = {"batch_size": args.batch_size, "batch_tokens": args.batch_tokens}
    print(json.dumps({**settings, "rows": len(sources), "groupings": results}))


if __name__ == "__main__":
    main()
