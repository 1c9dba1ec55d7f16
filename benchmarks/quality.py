"""What a cheaper dtype costs in quality: `python -m benchmarks.quality --data PATH [--dtypes bfloat16 int8]`.

The engine decodes a split (validation: test is for the final score alone) in float32 and in each dtype, with the
checkpoint's own settings. For each dtype: rows whose tokens are not float32's; float32's tokens that are in no common
run with the other output (one early difference changes all that follows, so positions are not compared); the ROUGE
difference with its 95 % paired bootstrap interval; and seconds, decoded one dtype after the other on a warm engine.

Knows nothing of `generate`: that float32 gives its tokens is benchmarks.parity's and benchmarks.shipped's business.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from app.engine import Engine, EngineConfig, GenerationParams
from benchmarks import texts
from benchmarks.report import Report, cores
from train.bootstrap import mean_interval, paired_difference
from train.metrics import ROUGE_TYPES, rouge_rows

NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def main() -> None:
    """Decode, score and print."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    model = texts.checkpoint(args.model)
    report = Report("Quality by dtype", args.device)
    pairs = texts.pairs(args.data, args.split, args.rows)
    references = [pair.references for pair in pairs]
    sources = texts.source_ids(model, [pair.document for pair in pairs])
    params = texts.own_settings(model)
    expected: list[list[int]] = []
    baseline: dict[str, list[float]] = {}
    results = []
    for dtype in ("float32", *args.dtypes):
        seconds, outputs = decode(args, model, params, sources, dtype)
        scores = rouge_rows(texts.texts(model, outputs), references, args.references)
        if dtype == "float32":
            expected, baseline = outputs, scores
        results.append(compared(dtype, seconds, outputs, expected, scores, baseline))
        print(f"{dtype}: {seconds:.1f} s", flush=True)
    report.say(
        f"{model.parent.name} {model.name} on {len(pairs)} rows ({args.split}), references: {args.references}; "
        f"{params.num_beams} beams; {args.threads} threads. ROUGE F1 x 100; differences to float32 with their 95 % "
        "paired bootstrap interval."
    )
    report.table(
        ["dtype", "rows differing", "tokens differing", *NAMES.values(), "seconds"],
        [
            [
                result["dtype"],
                f"{100 * result['rows_differing']:.1f} %",
                f"{100 * result['tokens_differing']:.1f} %",
                *(_cell(result, name) for name in ROUGE_TYPES),
                f"{result['seconds']:.1f}",
            ]
            for result in results
        ],
    )
    facts = {"model": f"{model.parent.name}@{model.name}", "split": args.split, "rows": len(pairs)}
    report.finish({**facts, "references": args.references, "threads": args.threads, "dtypes": results}, args.output)


def decode(
    args: argparse.Namespace, model: Path, params: GenerationParams, sources: list[list[int]], dtype: str
) -> tuple[float, list[list[int]]]:
    """Seconds and outputs in the order of the sources, which are decoded longest first."""
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs, max_num_beams=params.num_beams, device=args.device, dtype=dtype
    )
    engine = Engine.from_folder(model, config)
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    engine.generate([sources[i] for i in order[: args.max_num_seqs]], params)  # warm
    started = time.perf_counter()
    outputs = engine.generate([sources[i] for i in order], params)
    seconds = time.perf_counter() - started
    tokens: list[list[int]] = [[] for _ in sources]
    for i, output in zip(order, outputs, strict=True):
        tokens[i] = list(output.hypotheses[0].token_ids)
    return seconds, tokens


def compared(
    dtype: str,
    seconds: float,
    outputs: list[list[int]],
    expected: list[list[int]],
    scores: dict[str, list[float]],
    baseline: dict[str, list[float]],
) -> dict[str, Any]:
    """One row: scores, and differences to float32."""
    matched = sum(
        block.size
        for ours, theirs in zip(outputs, expected, strict=True)
        for block in SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks()
    )
    return {
        "dtype": dtype,
        "seconds": round(seconds, 1),
        "rows_differing": round(sum(a != b for a, b in zip(outputs, expected, strict=True)) / len(expected), 4),
        "tokens_differing": round(1 - matched / sum(map(len, expected)), 4),
        "scores": {name: asdict(mean_interval(scores[name])) for name in ROUGE_TYPES},
        # A bootstrap of zeros has no interval.
        "difference": {
            name: asdict(paired_difference(scores[name], baseline[name])) if scores[name] != baseline[name] else None
            for name in ROUGE_TYPES
        },
    }


def _cell(result: dict[str, Any], name: str) -> str:
    difference = result["difference"][name]
    score = f"{result['scores'][name]['mean']:.2f}"
    if difference is None:
        return score if result["dtype"] == "float32" else f"{score}: same in every row"
    return f"{score}: {difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="hub id, or a folder with one file a split")
    parser.add_argument("--model", type=Path, help="a folder; default: the newest model of the store")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--rows", type=int, help="the first so many; default: all")
    parser.add_argument("--references", choices=("first", "mean", "best"), default="first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--max-num-seqs", type=int, default=EngineConfig().max_num_seqs, help="the engine's slots")
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    main()
