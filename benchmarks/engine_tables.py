"""What the rounds of benchmarks/engine.py say: medians, ratios, and the tables that print them.

A row is plain data, as it stands in the line of JSON, and the tables are printed from rows: a kept result can be
printed again. Does not measure, and does not know the machine.
"""

from __future__ import annotations

from typing import Any

from benchmarks.contenders import BEAMS, Size, Timing
from benchmarks.floor import Floor
from benchmarks.report import Report, Spread, significant

Row = dict[str, Any]


def summarise(timings: dict[str, list[Timing]], steps: int, floor: Floor) -> Row:
    """Medians and ratios by contender; a ratio is taken within each round, the contender over `ours`.

    Args:
        timings: of each contender, one a round; `ours` and `generate` are among them.
        steps: how many steps `Timing.steps` holds.
        floor: of one step.
    """

    def milliseconds(part: str, per: int = 1) -> dict[str, list[float]]:
        return {name: Spread.of(1e3 * getattr(t, part) / per for t in held).plain() for name, held in timings.items()}

    def ratios(part: str) -> dict[str, list[float]]:
        ours = [getattr(t, part) for t in timings["ours"]]
        return {
            name: Spread.of(getattr(t, part) / o for t, o in zip(held, ours, strict=True)).plain()
            for name, held in timings.items()
            if name != "ours"
        }

    tokens = {name: held[-1].tokens for name, held in timings.items()}
    step_ms = milliseconds("steps", steps)
    return {
        "encode_ms": milliseconds("encode"),
        "decode_ms": milliseconds("decode"),
        "step_ms": step_ms,
        "total_ms": milliseconds("total"),
        "ratio": ratios("steps"),
        "ratio_decode": ratios("decode"),
        "ratio_total": ratios("total"),
        "floor_bytes": floor.read_bytes,
        "floor_ms": significant(floor.read_ms),
        "over_floor": significant(step_ms["ours"][0] / floor.read_ms),
        "arithmetic_ms": significant(floor.arithmetic_ms),
        "differing": sum(a != b for a, b in zip(tokens["ours"], tokens["generate"], strict=True)),
        "distinct": len(set(map(tuple, tokens["ours"]))),
        "unsteady": sum(held.tokens != tokens["ours"] for held in timings["ours"]),
    }


def summarise_batches(dtype: str, found: dict[int, float], rows: list[Row]) -> Row:
    """generate's sequences a second by batch size (`found`), those of our rows, and the ratio of the two bests."""
    ours = {row["sequences"]: 1e3 * row["sequences"] / row["total_ms"]["ours"][0] for row in rows}
    return {
        "dtype": dtype,
        "generate": {batch: significant(rate) for batch, rate in found.items()},
        "ours": {count: significant(rate) for count, rate in ours.items()},
        "ratio": significant(max(ours.values()) / max(found.values())) if found else None,
    }


def summarise_memory(ours: dict[str, int], generate: dict[str, int]) -> Row:
    """Both sides' bytes as benchmarks/peak_memory.py gives them, and ratios, ours over generate's."""
    return {
        "ours": ours,
        "generate": generate,
        "ratio_run": significant(ours["run"] / max(generate["run"], 1)),
        "ratio_peak": significant(ours["peak"] / generate["peak"]),
    }


def print_speed(report: Report, rows: list[Row], size: Size, rounds: int) -> None:
    """Against generate."""
    report.say(
        f"Milliseconds; {size.source_tokens} source tokens, {size.new_tokens} forced, {BEAMS} beams; "
        f"median of {rounds} rounds (range). `decode ratio`: generate's step over ours, nothing encoded "
        "in it on either side; `whole loop`: with the cross-attention keys and values that generate computes in "
        "its first step. `differing`: sequences whose tokens are not generate's."
    )
    headers = ["dtype (generate's)", "seqs", "encode ours", "encode generate", "step ours", "step generate"]
    headers += ["decode ratio", "whole loop", "end to end", "differing"]
    cells = []
    for row in rows:
        cells.append(
            [
                _name(row),
                row["sequences"],
                f"{row['encode_ms']['ours'][0]:.1f}",
                f"{row['encode_ms']['generate'][0]:.1f}",
                _show(row["step_ms"]["ours"]),
                _show(row["step_ms"]["generate"]),
                _show(row["ratio"]["generate"]),
                f"{row['ratio_decode']['generate'][0]:.2f}",
                f"{row['ratio_total']['generate'][0]:.2f}",
                f"{row['differing']} of {row['sequences']}",
            ]
        )
    report.table(headers, cells)
    distinct = ", ".join(f"{row['distinct']} of {row['sequences']}" for row in rows)
    unsteady = sum(row["unsteady"] for row in rows)
    report.say(
        f"Rounds in which the engine's tokens were not those of its last round: {unsteady}. "
        f"Distinct outputs: {distinct}."
    )


def print_floor(report: Report, rows: list[Row], size: Size) -> None:
    """Against the hardware."""
    report.say("A step against its floor (bytes that it must read, over the measured bandwidth):")
    headers = ["dtype", "its rows in", "seqs", "floor MB", "floor ms", "arithmetic ms", "step ms", "step / floor"]
    headers += ["tokens/s decoding", "tokens/s end to end"]
    cells = []
    for row in rows:
        step, total = row["step_ms"]["ours"][0], row["total_ms"]["ours"][0]
        cells.append(
            [
                row["dtype"],
                row["rows_in"],
                row["sequences"],
                f"{row['floor_bytes'] / 1e6:.0f}",
                f"{row['floor_ms']:.3f}",
                f"{row['arithmetic_ms']:.3f}",
                f"{step:.3f}",
                f"{row['over_floor']:.2f}",
                f"{1e3 * row['sequences'] / step:.0f}",
                f"{1e3 * row['sequences'] * size.new_tokens / total:.0f}",
            ]
        )
    report.table(headers, cells)


def print_others(report: Report, rows: list[Row], name: str, title: str) -> None:
    """Against another contender of the same rounds, where it met ours."""
    held = [row for row in rows if name in row["ratio"]]
    if not held:
        return
    report.say(f"Against {title}, in the same rounds:")
    headers = ["ours", "seqs", "step ms, ours", f"step ms, {title}", "step ratio"]
    headers += ["end to end ms, ours", title, "end to end ratio"]
    cells = []
    for row in held:
        cells.append(
            [
                row["dtype"],
                row["sequences"],
                _show(row["step_ms"]["ours"]),
                _show(row["step_ms"][name]),
                _show(row["ratio"][name]),
                f"{row['total_ms']['ours'][0]:.1f}",
                f"{row['total_ms'][name][0]:.1f}",
                _show(row["ratio_total"][name]),
            ]
        )
    report.table(headers, cells)


def print_best_batches(report: Report, rows: list[Row]) -> None:
    """Throughput by batch size, where it was searched."""
    if not rows:
        return
    report.say("Sequences a second, end to end, at each batch size; the ratio is of the two bests:")
    cells = []
    for row in rows:
        sides = [", ".join(f"{n}: {rate:.2f}" for n, rate in row[name].items()) for name in ("generate", "ours")]
        cells.append([row["dtype"], *sides, row["ratio"]])
    report.table(["dtype", "generate", "ours", "ratio"], cells)


def print_memory(report: Report, rows: list[Row]) -> None:
    """Peaks of both sides."""
    headers = ["dtype (generate's)", "seqs", "ours: peak", "of it the run", "while loading"]
    headers += ["generate: peak", "of it the run", "ratio of peaks", "ratio of runs"]
    mebi = 2**20
    report.say("Peak memory in MiB, each side in a fresh process; ratios are ours over generate's:")
    report.table(
        headers,
        [
            [
                _name(row),
                row["sequences"],
                f"{row['ours']['peak'] / mebi:.0f}",
                f"{row['ours']['run'] / mebi:.0f}",
                f"{row['ours']['loading'] / mebi:.0f}",
                f"{row['generate']['peak'] / mebi:.0f}",
                f"{row['generate']['run'] / mebi:.0f}",
                f"{row['ratio_peak']:.2f}",
                f"{row['ratio_run']:.2f}",
            ]
            for row in rows
        ],
    )


def _name(row: Row) -> str:
    same = row["dtype"] == row["generate_dtype"]
    return row["dtype"] if same else f"{row['dtype']} ({row['generate_dtype']})"


def _show(values: list[float]) -> str:
    return Spread(*values).show(digits=1 if values[0] >= 10 else 3 if values[0] < 1 else 2)
