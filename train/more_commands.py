"""The commands around the four steps: first stages, pseudo-labels, averages, searches and plots.

Knows words of the command line and what is printed. Does not know how anything is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_more(commands: Any) -> None:
    """Add the parsers of these commands to the others."""
    denoise = commands.add_parser("denoise", help="the first stage alone: learn to restore noised text")
    _add_run(denoise)

    label = commands.add_parser("pseudo-label", help="summaries of stronger models as training targets")
    label.add_argument(
        "--model", required=True, nargs="+", type=Path, metavar="FOLDER", help="the teachers: exported, or runs'"
    )
    label.add_argument(
        "--candidates", type=int, default=1, metavar="N", help="of each teacher its N best; of all, the consensus"
    )
    label.add_argument(
        "--closest-to-reference", action="store_true", help="of all candidates, the one nearest to the first reference"
    )
    label.add_argument(
        "--keep-candidates", action="store_true", help="write all of them, too, for [ranking] of a further run"
    )
    label.add_argument(
        "--generation",
        nargs="+",
        default=[],
        metavar="key=value",
        help="over the teachers' own settings: num_beams=16 num_beam_groups=16 diversity_penalty=0.1",
    )
    label.add_argument("--output", required=True, type=Path, help="FILE.jsonl or FILE.jsonl.xz")
    label.add_argument("--split", default="train")
    label.add_argument("--limit", type=count, help="the first rows only")
    _add_data(label)
    add_device(label)

    average = commands.add_parser("average", help="mean weights of checkpoints, kept if validation says so")
    which = average.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="average its last checkpoints, and compare with its best")
    which.add_argument("--checkpoints", nargs="+", type=Path, metavar="FOLDER", help="average these into --output")
    average.add_argument("--last", type=int, default=2, metavar="N", help="checkpoints of --run")
    average.add_argument("--output", type=Path, help="a new folder, with --checkpoints")
    average.add_argument("--data", help="where the data are now, if not where the run read them")
    average.add_argument("--rows", type=count, help="of validation, from the first; by default all")

    decoding = commands.add_parser("search-decoding", help="decode settings by ROUGE and latency on validation")
    decoding.add_argument("--model", required=True, type=Path, help="an exported folder, or a run's")
    decoding.add_argument("--rows", type=count, help="of validation, from the first; by default all")
    for option, (kind, values) in DECODING.items():
        listed = ",".join(map(str, values))
        decoding.add_argument(
            f"--{option}", type=_list_of(kind), default=values, metavar="LIST", help=f"by default {listed}"
        )
    decoding.add_argument("--grid", action="store_true", help="every combination, not one option after the other")
    decoding.add_argument("--references", choices=("first", "mean", "best"), default="first")
    decoding.add_argument(
        "--freeze", action="store_true", help="write the choice into the run's generation_config.json"
    )
    decoding.add_argument("--output", type=Path, help="write every trial as JSON")
    _add_data(decoding)
    add_device(decoding)

    search = commands.add_parser("search", help="hyper-parameters by Optuna, in the ranges of [search]")
    search.add_argument("--trials", required=True, type=int, metavar="N", help="of the whole study")
    search.add_argument("--storage", metavar="FILE", help="keep the study here (SQLite), and go on with it")
    _add_run(search, resume=False)

    many = commands.add_parser("sweep", help="many runs side by side, and a table of them")
    many.add_argument("--plan", required=True, metavar="FILE", help="TOML file, see train/configs/")
    many.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder a run, and sweep.json")
    many.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    many.add_argument("--minutes", type=float, metavar="M", help="cut off whatever still runs then")
    many.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")

    plot = commands.add_parser("plot", help="loss, ROUGE, learning rate and gradient norm of a run, also while it runs")
    plot.add_argument("run", type=Path, metavar="RUN", help="its output_dir")
    plot.add_argument("--output", type=Path, metavar="FILE.png", help="by default RUN/plot.png")
    plot.add_argument("--no-terminal", action="store_true", help="the PNG alone")


# Option, the type of its values, and those tried by default.
DECODING: dict[str, tuple[type[int] | type[float], tuple[Any, ...]]] = {
    "num-beams": (int, (1, 2, 4, 6)),
    "length-penalty": (float, (0.6, 1.0, 1.5, 2.0)),
    "min-length": (int, (0, 8, 16)),
    "max-length": (int, (64, 128)),
    "no-repeat-ngram-size": (int, (0, 2, 3)),
}


def _denoise(args: argparse.Namespace) -> None:
    from train.config import load_config
    from train.finetune import denoise_only

    print(f"denoised model: {denoise_only(load_config(args.config, args.overrides), resume=args.resume)}")


def _pseudo_label(args: argparse.Namespace) -> None:
    from train.config import parse_words
    from train.evaluate import data_settings
    from train.pseudo_label import pseudo_label

    data = data_settings(args.model[0], None, path=args.data, **_columns(args))
    record = pseudo_label(
        args.model,
        data,
        args.output,
        split=args.split,
        limit=args.limit,
        candidates=args.candidates,
        closest_to_reference=args.closest_to_reference,
        keep_candidates=args.keep_candidates,
        generation=parse_words(args.generation),
        device=args.device,
        dtype=args.dtype,
    )
    empty = f"; {record['empty_summaries']} empty ones left out" if record["empty_summaries"] else ""
    print(f"{record['rows']} rows{empty}: {args.output}")


def _average(args: argparse.Namespace) -> None:
    from train.average import average, average_run, format_comparison
    from train.records import EvaluationError

    if args.run is not None:
        print(format_comparison(average_run(args.run, args.last, args.data, args.rows)))
        return
    if args.output is None:
        raise EvaluationError("--checkpoints needs --output: where the average is written")
    print(f"average of {len(args.checkpoints)}: {average(args.checkpoints, args.output)}")


def _search_decoding(args: argparse.Namespace) -> None:
    from train.decoding_search import check_not_exported, format_pareto, freeze, search_decoding
    from train.evaluate import data_settings

    if args.freeze:
        check_not_exported(args.model)
    space = {name: vars(args)[name] for name in (option.replace("-", "_") for option in DECODING)}
    result = search_decoding(
        args.model,
        data_settings(args.model, None, path=args.data, **_columns(args)),
        space,
        args.rows,
        args.grid,
        args.references,
        args.device,
        args.dtype,
    )
    print(format_pareto(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.freeze:
        print(f"frozen: {freeze(args.model, result)}")


def _search(args: argparse.Namespace) -> None:
    from train.config import load_config
    from train.search import format_search, search

    print(format_search(search(load_config(args.config, args.overrides), args.trials, args.storage)))


def _sweep(args: argparse.Namespace) -> None:
    from train.sweep import TABLE, SweepError, format_sweep, load_plan, sweep

    rows = sweep(load_plan(args.plan), args.output, args.jobs, args.overrides, args.minutes)
    print(format_sweep(rows))
    if failed := sum(row["state"] == "failed" for row in rows):
        raise SweepError(f"{failed} of {len(rows)} runs failed; see {args.output / TABLE}")


def _plot(args: argparse.Namespace) -> None:
    from train.plot import panels, read_log, terminal, write_png

    drawn = panels(read_log(args.run))
    if not args.no_terminal:
        print(terminal(drawn))
    print(f"plot: {write_png(drawn, args.output or args.run / 'plot.png', args.run.resolve().name)}")


MORE: dict[str, Callable[[argparse.Namespace], None]] = {
    "denoise": _denoise,
    "pseudo-label": _pseudo_label,
    "average": _average,
    "search-decoding": _search_decoding,
    "search": _search,
    "sweep": _sweep,
    "plot": _plot,
}


def _add_run(parser: argparse.ArgumentParser, resume: bool = True) -> None:
    parser.add_argument("--config", required=True, help="TOML file, see train/configs/")
    if resume:
        parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.epochs=1")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="hub id, or a folder with one file a split; by default the model's own")
    for column in ("source", "target", "references"):
        parser.add_argument(f"--{column}-column", metavar="NAME", help="by default the model's own")


def count(text: str) -> int:
    """The type of an option that counts something: a whole number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; it is {number}")
    return number


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a model runs, and what it computes in: what the engine has (`app.engine.EngineConfig.dtype`)."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        default="float32",
        help="what it computes in; int8 is the engine's alone, on a CPU",
    )


def _columns(args: argparse.Namespace) -> dict[str, str | None]:
    return {name: vars(args)[name] for name in ("source_column", "target_column", "references_column")}


def _list_of(kind: type[int] | type[float]) -> Callable[[str], tuple[Any, ...]]:
    """`1,2,4` as numbers; argparse names the option and the word that is wrong."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(word) for word in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse
