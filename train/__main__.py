"""`python -m train COMMAND`: the four steps from data to a served model; `train/more_commands.py` has the others."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import ConfigError
from train.more_commands import MORE, add_device, add_more, count

if TYPE_CHECKING:
    from train.evaluate import Evaluated
    from train.scorers import Scorer
    from train.systems import System


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words, run one command, and turn what the user got wrong into one line on stderr."""
    args = parser().parse_args(argv)
    args.command_line = shlex.join(["python", "-m", "train", *(sys.argv[1:] if argv is None else argv)])
    # Imported here: `--help` and a mistyped option need no torch.
    from app.engine.checkpoint import CheckpointError
    from train.data import DataError
    from train.export import ExportError
    from train.plot import PlotError
    from train.records import EvaluationError
    from train.sweep import SweepError
    from train.tokenizer_pair import TokenizerError
    from train.warm_start import WarmStartError

    commands = {"finetune": _finetune, "evaluate": _evaluate, "export": _export, "card": _card, **MORE}
    mine = (ConfigError, DataError, WarmStartError, EvaluationError, ExportError, PlotError, TokenizerError)
    wrong = (*mine, CheckpointError, SweepError, OSError)
    try:
        commands[args.command](args)
    except wrong as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    finetune = commands.add_parser("finetune", help="warm-start and fine-tune a model")
    finetune.add_argument("--config", required=True, help="TOML file, see train/configs/")
    finetune.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of output_dir")
    finetune.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.epochs=1")

    evaluate = commands.add_parser("evaluate", help="ROUGE with intervals, and a report")
    evaluate.add_argument("--model", required=True, type=Path, help="an exported folder, or a run's")
    evaluate.add_argument("--data", help="hub id, or a folder with one file a split; by default the run's")
    evaluate.add_argument("--run", type=Path, help="the run's folder: it knows where the data were read")
    for column in ("source", "target", "references"):
        evaluate.add_argument(f"--{column}-column", metavar="NAME", help="by default the run's")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--references", choices=("first", "mean", "best"), default="first")
    evaluate.add_argument("--limit", type=count, help="score the first rows only")
    evaluate.add_argument("--output", type=Path, help="write everything, each row too, as JSON")
    evaluate.add_argument("--drop-leaks", action="store_true", help="leave out rows whose document stands in train")
    add_device(evaluate)
    evaluate.add_argument(
        "--through",
        choices=("auto", "engine", "generate"),
        default="auto",
        help="what decodes; auto: the engine, but `generate` for a model that the engine does not have",
    )
    report = evaluate.add_argument_group("report")
    report.add_argument("--report", type=Path, metavar="DIR", help="write report.md, report.json and plots there")
    report.add_argument(
        "--samples",
        choices=("full", "ids"),
        default="full",
        help="ids: no document or reference in report.md, for data that may not be copied",
    )
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "type": Path}
    report.add_argument("--against", metavar="FOLDER", help="earlier models, on the same rows", **many)
    report.add_argument("--against-rows", metavar="FILE", help="earlier JSON files that have these rows", **many)
    report.add_argument("--seeds", metavar="FOLDER", help="models of the same settings with other seeds", **many)
    report.add_argument(
        "--metric",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="bertscore model=FOLDER layers=N, alignscore model=NAME checkpoint=FILE, or module:Class",
    )

    export = commands.add_parser("export", help="write a run into the model store and check it")
    export.add_argument("--run", required=True, type=Path, help="a run's output_dir, or a model folder")
    export.add_argument("--store", default=Path("model_store"), type=Path)
    export.add_argument("--version", required=True, help="X.Y.Z")
    export.add_argument("--name", help="by default the run's")
    export.add_argument("--data", help="where the data are now, if not where the run read them")
    export.add_argument("--evaluation", nargs="+", action="extend", default=[], type=Path, metavar="FILE")
    export.add_argument("--parity-rows", default=16, type=int, help="validation rows compared with `generate`")

    card = commands.add_parser("card", help="put evaluations into an exported folder's card and manifest")
    card.add_argument("--model", required=True, type=Path, help="an exported folder")
    card.add_argument("--evaluation", nargs="+", action="extend", default=[], type=Path, metavar="FILE")
    card.add_argument(
        "--elsewhere",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FILE"),
        help="an evaluation on data that the model was not made for",
    )
    card.add_argument(
        "--limit", action="append", metavar="SENTENCE", help="where it fails; these replace what the card has"
    )

    add_more(commands)
    return parser


def _finetune(args: argparse.Namespace) -> None:
    from train.config import load_config
    from train.finetune import finetune

    print(f"best model: {finetune(load_config(args.config, args.overrides), resume=args.resume)}")


def _evaluate(args: argparse.Namespace) -> None:
    import json

    from train.evaluate import data_settings, format_table, read_rows, scored, summarise_rows
    from train.records import EvaluationError
    from train.scorers import load_scorer
    from train.systems import rows_system

    beyond = [name for name in ("against", "against_rows", "seeds", "metric") if getattr(args, name)]
    if beyond and not args.report:
        raise EvaluationError(f"--{beyond[0].replace('_', '-')} goes into a report; give --report")
    data = data_settings(
        args.model,
        args.run,
        path=args.data,
        source_column=args.source_column,
        target_column=args.target_column,
        references_column=args.references_column,
    )
    rows = read_rows(data, args.split, args.limit, args.drop_leaks)
    # Before minutes of decoding: what may be mistyped.
    metrics = [load_scorer(words) for words in args.metric]
    earlier = [rows_system(path, rows.pairs) for path in args.against_rows]
    evaluated = summarise_rows(args.model, rows, args.device, args.dtype, args.through)
    result = scored(evaluated, args.references)
    print(format_table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.report:
        _report(args, evaluated, result, metrics, earlier)


def _report(
    args: argparse.Namespace,
    evaluated: Evaluated,
    result: dict[str, Any],
    metrics: list[tuple[str, dict[str, str], Scorer]],
    earlier: list[System],
) -> None:
    from train.evaluate import summarise_rows
    from train.report import build_report, write_report
    from train.systems import evaluated_system

    def summarised(folder: Path) -> Evaluated:
        return summarise_rows(folder, evaluated.rows, args.device, args.dtype, args.through)

    report = build_report(
        evaluated,
        [*(evaluated_system(summarised(folder)) for folder in args.against), *earlier],
        [summarised(folder) for folder in args.seeds],
        metrics,
        args.run,
        args.command_line,
    )
    write_report(args.report, result, report, evaluated.rows.pairs, args.samples)
    print(f"report: {args.report / 'report.md'}")


def _export(args: argparse.Namespace) -> None:
    from train.export import export

    folder = export(args.run, args.store, args.version, args.data, args.evaluation, args.parity_rows, args.name)
    print(f"exported: {folder}")


def _card(args: argparse.Namespace) -> None:
    from train.export import card

    elsewhere = {name: Path(file) for name, file in args.elsewhere}
    print(f"card: {card(args.model, args.evaluation, elsewhere, args.limit)}")


if __name__ == "__main__":
    sys.exit(main())
