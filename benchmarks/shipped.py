"""The shipped checkpoint on real dialogues, natural stopping: `python -m benchmarks.shipped --data PATH`.

DialogSum's test dialogues with the checkpoint's own decode settings; summaries a second of the engine and of `generate`
in its best static batching. Tokenising and writing out text are left out on both sides; the order of work is not: both
get the sources sorted by length, longest first.

generate's batch size is searched on two windows of neighbours in the sorted order (so that a large batch holds sources
of like length there, too); the `--candidates` fastest of the search then decode every row, and the fastest of those
counts. The engine decodes the same rows before and after each of them; its figure is the median.

Beside the rates stands what matrix products alone would allow: those of the engine's run, each weight with each token
of a source or each row of a step, at the rate of one large product. Attention, norms and the choice of tokens are not
in it.

Differences: in float32 each row of ours that is not generate's is decoded again by generate, alone and unpadded.
int8 meets generate in float32. Knows nothing of HTTP, arrival times or quality: see serving.py and quality.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from app.engine import Engine, EngineConfig, GenerationParams
from benchmarks import texts
from benchmarks.apart import GenerateApart
from benchmarks.contenders import Generate
from benchmarks.floor import decoder_weights, saved_dtype, source_weights
from benchmarks.hardware import measure_rate, rows_in
from benchmarks.report import Report, Spread, cores, significant

BATCH_SIZES = (1, 4, 8, 16, 32, 64)


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    model = texts.checkpoint(args.model)
    report = Report("The shipped checkpoint on DialogSum, natural stopping", args.device)
    params = texts.own_settings(model)
    documents = [pair.document for pair in texts.pairs(args.data, args.split, args.rows)]
    sources = sorted(texts.source_ids(model, documents), key=len, reverse=True)
    lengths = [len(ids) for ids in sources]
    report.say(
        f"{model.parent.name} {model.name} on {len(sources)} dialogues ({args.split}), "
        f"{sum(lengths) / len(lengths):.0f} tokens each (at most {lengths[0]}); "
        f"{params.num_beams} beams, at most {params.max_new_tokens} tokens; "
        f"{args.threads} threads, {args.max_num_seqs} slots."
    )
    rows = [measure(args, model, params, sources, dtype) for dtype in args.dtypes]
    report.table(
        [
            "dtype (generate's)",
            "ours: summaries/s",
            "generate",
            "its batch size",
            "ratio",
            "differing",
            "from it alone",
        ],
        [
            [
                row["dtype"] if row["dtype"] == row["generate_dtype"] else f"{row['dtype']} ({row['generate_dtype']})",
                Spread(*row["ours_per_second"]).show(),
                f"{row['generate_per_second']:.2f}",
                row["batch_size"],
                f"{row['ratio']:.2f}",
                f"{row['differing']} of {len(sources)}",
                "not asked" if row["differing_alone"] is None else row["differing_alone"],
            ]
            for row in rows
        ],
    )
    for row in rows:
        search = ", ".join(f"{size}: {rate:.2f}" for size, rate in row["search"].items())
        whole = ", ".join(f"{size}: {rate:.2f}" for size, rate in row["all_rows"].items())
        large = row["multiplications_per_second"] / 1e9
        report.say(
            f"{row['dtype']}, rows in {row['rows_in']}: generate's summaries/s by batch size on {row['search_rows']} "
            f"rows: {search}; on all: {whole}. Output tokens: ours {row['mean_output_tokens']:.1f} a summary. With "
            f"nothing but its products, at the rate of a large one ({large:.0f}e9 a second): "
            f"{row['products_alone_per_second']:.1f} summaries/s, {row['products_alone_ratio']:.2f} of generate's."
        )
    facts = {"model": f"{model.parent.name}@{model.name}", "split": args.split, "rows": len(sources)}
    report.finish({**facts, "threads": args.threads, "max_num_seqs": args.max_num_seqs, "dtypes": rows}, args.output)


def measure(
    args: argparse.Namespace, model: Path, params: GenerationParams, sources: list[list[int]], dtype: str
) -> dict[str, Any]:
    """One dtype: the search, then all rows in turn."""
    reference = "float32" if dtype == "int8" else dtype
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_num_beams=params.num_beams,
        max_encode_tokens=args.max_encode_tokens,
        device=args.device,
        dtype=dtype,
    )
    engine = Engine.from_folder(model, config)
    generate = (GenerateApart if args.device == "cpu" else Generate)(model, reference, args.device)
    windows = neighbours(sources, args.search_rows)
    search: dict[int, float] = {}
    for size in args.batch_sizes:
        generate.generate(windows[0][:size])  # warm at this width
        seconds = sum(in_batches(generate, window, size)[0] for window in windows)
        search[size] = sum(map(len, windows)) / seconds
        print(f"{dtype}: generate in batches of {size}: {search[size]:.2f} a second", flush=True)
    candidates = sorted(search, key=lambda size: -search[size])[: args.candidates]
    by_engine(engine, params, sources[: args.max_num_seqs])  # warm
    ours, theirs = [], {}
    of_sources, of_rows, rows_before = source_weights(model), decoder_weights(model), engine.tally.rows
    seconds, outputs = by_engine(engine, params, sources)
    ours.append(seconds)
    multiplications = of_sources * sum(map(len, sources)) + of_rows * (engine.tally.rows - rows_before)
    expected: list[list[int]] = []
    for size in candidates:
        seconds, found = in_batches(generate, sources, size)
        theirs[size] = len(sources) / seconds
        expected = found if size == max(theirs, key=lambda s: theirs[s]) else expected
        seconds, again = by_engine(engine, params, sources)
        if again != outputs:
            raise SystemExit(f"{dtype}: the engine's outputs are not the same twice")
        ours.append(seconds)
    best = max(theirs, key=lambda size: theirs[size])
    per_second = measure_rate(args.device, dtype, saved_dtype(model))
    products_alone = len(sources) * per_second / multiplications
    rates = Spread.of(len(sources) / seconds for seconds in ours)
    differing = [i for i, (a, b) in enumerate(zip(outputs, expected, strict=True)) if a != b]
    alone = sum(outputs[i] != generate.generate([sources[i]])[0] for i in differing) if dtype == "float32" else None
    return {
        "dtype": dtype,
        "generate_dtype": reference,
        "rows_in": str(rows_in(args.device, dtype)).removeprefix("torch."),
        "ours_per_second": rates.plain(),
        "generate_per_second": significant(theirs[best]),
        "batch_size": best,
        "ratio": significant(rates.median / theirs[best]),
        "differing": len(differing),
        "differing_alone": alone,
        "search_rows": sum(map(len, windows)),
        "search": {size: significant(rate) for size, rate in search.items()},
        "all_rows": {size: significant(rate) for size, rate in theirs.items()},
        "multiplications_per_second": significant(per_second),
        "products_alone_per_second": significant(products_alone),
        "products_alone_ratio": significant(products_alone / theirs[best]),
        "mean_output_tokens": significant(sum(map(len, outputs)) / len(outputs)),
    }


def neighbours(sources: list[list[int]], count: int) -> list[list[list[int]]]:
    """Two windows of the sorted sources, around the quartiles, of `count` rows together."""
    half = min(count, len(sources)) // 2
    starts = [max(0, min(len(sources) - half, round(share * len(sources)) - half // 2)) for share in (0.25, 0.75)]
    return [sources[start : start + half] for start in starts]


def in_batches(
    generate: Generate | GenerateApart, sources: list[list[int]], size: int
) -> tuple[float, list[list[int]]]:
    """Seconds and outputs of generate, so many rows at a time."""
    started = time.perf_counter()
    outputs = [row for at in range(0, len(sources), size) for row in generate.generate(sources[at : at + size])]
    return time.perf_counter() - started, outputs


def by_engine(engine: Engine, params: GenerationParams, sources: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Seconds and outputs of the engine."""
    started = time.perf_counter()
    outputs = engine.generate(sources, params)
    return time.perf_counter() - started, [list(output.hypotheses[0].token_ids) for output in outputs]


def _arguments() -> argparse.Namespace:
    defaults = EngineConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="hub id, or a folder with one file a split")
    parser.add_argument("--model", type=Path, help="a folder; default: the newest model of the store")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs, help="the engine's slots")
    parser.add_argument("--max-encode-tokens", type=int, default=defaults.max_encode_tokens)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, help="of generate, to be searched")
    parser.add_argument("--search-rows", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=2, help="batch sizes that decode every row")
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    main()
