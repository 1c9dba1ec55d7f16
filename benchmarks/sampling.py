"""What a step costs that draws its tokens: `python -m benchmarks.sampling`.

Four samples of each text, or four beams that draw, with the filters that people use, beside four beams that do not. A
random checkpoint of the shipped one's size (6 + 6 layers, 384 wide, 30,522 tokens), sources of 192 tokens, 48 forced
ones: there the vocabulary weighs as much as the layers, and draws are of the vocabulary. The engine and `generate` (on
a CPU in a process of its own) in turn, at the same dtype and options; their draws are not the same, and as many. A step
is timed as in benchmarks/engine.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from app.engine import EngineConfig, GenerationParams
from benchmarks.apart import GenerateApart
from benchmarks.contenders import SIZES, Generate, Ours, forced_config, random_sources, write_checkpoint
from benchmarks.engine import in_turn
from benchmarks.report import Report, Spread, cores

ROWS = 4  # samples or beams of a text


@dataclass(frozen=True)
class Setting:
    """One way to choose tokens.

    Attributes:
        name: in the table.
        num_beams: 1 is ROWS samples of each text, ROWS is so many beams.
        options: `top_k` 0 and `top_p` 1 filter nothing; none at all draws nothing.
    """

    name: str
    num_beams: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def params(self, new_tokens: int) -> GenerationParams:
        """For the engine."""
        return GenerationParams(min_new_tokens=new_tokens, max_new_tokens=new_tokens, **self._all(), seed=1)

    def config(self, new_tokens: int) -> GenerationConfig:
        """The same for `generate`."""
        config = forced_config(new_tokens)
        config.update(**{"no_repeat_ngram_size": 0, **self._all()})
        return config

    def _all(self) -> dict[str, Any]:
        return {"num_beams": self.num_beams, "num_return_sequences": ROWS, "do_sample": bool(self.options)} | (
            self.options
        )


SETTINGS = [
    Setting(f"{ROWS} beams, no draws", ROWS),
    Setting("top_k 50", options={"temperature": 0.8, "top_k": 50, "top_p": 1.0}),
    Setting("top_k 50, top_p 0.9", options={"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
    Setting("top_p 0.9", options={"temperature": 0.8, "top_k": 0, "top_p": 0.9}),
    Setting("no filter", options={"temperature": 0.8, "top_k": 0, "top_p": 1.0}),
    Setting(f"{ROWS} beams, top_k 50", ROWS, {"temperature": 0.8, "top_k": 50, "top_p": 1.0}),
]


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    report = Report(f"Draws against those of `generate` on {args.device}", args.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_checkpoint(folder, size)
        slots = max(args.sequences)
        config = EngineConfig(
            max_num_seqs=slots,
            max_num_beams=ROWS,
            max_encode_tokens=slots * size.source_tokens,
            max_output_tokens=size.new_tokens,
            device=args.device,
            dtype=args.dtype,
        )
        ours = Ours(folder, args.dtype, args.device, size.new_tokens, config)
        for setting in SETTINGS:
            ours.params = setting.params(size.new_tokens)
            of_generate = (folder, args.dtype, args.device, setting.config(size.new_tokens))
            if args.device == "cpu":
                with closing(GenerateApart(*of_generate)) as apart:
                    rows += compare(ours, apart, setting, args)
            else:
                rows += compare(ours, Generate(*of_generate), setting, args)
    report.say(
        f"Threads: {args.threads}. {args.dtype}, {size.source_tokens} source tokens, {size.new_tokens} forced, {ROWS} "
        f"rows of each text. Milliseconds a step, median of {args.rounds} rounds (range); the ratio is generate's over "
        "ours."
    )
    report.table(
        ["tokens by", "seqs", "step ours", "step generate", "ratio"],
        [
            [row["setting"], row["sequences"], *(Spread(*row[key]).show() for key in ("ours", "generate", "ratio"))]
            for row in rows
        ],
    )
    report.finish({"size": args.size, "dtype": args.dtype, "rounds": args.rounds, "rows": rows}, args.output)


def compare(
    ours: Ours, generate: Generate | GenerateApart, setting: Setting, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each number of sequences."""
    rows = []
    size = SIZES[args.size]
    for count in args.sequences:
        timings = in_turn({"ours": ours, "generate": generate}, random_sources(count, size), args.rounds)
        steps = {name: [1e3 * t.steps / (size.new_tokens - 1) for t in held] for name, held in timings.items()}
        ratios = [theirs / own for own, theirs in zip(steps["ours"], steps["generate"], strict=True)]
        spreads = {**steps, "ratio": ratios}
        row = {"setting": setting.name, "sequences": count}
        rows.append(row | {name: Spread.of(values).plain() for name, values in spreads.items()})
        print(f"{setting.name}, {count} sequences: {rows[-1]['ratio'][0]:.2f}x", file=sys.stderr, flush=True)
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--output", type=Path, help="Markdown file to keep the result in")
    return parser.parse_args()


if __name__ == "__main__":
    main()
