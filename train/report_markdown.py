"""The report as Markdown, from what `report.json` holds.

Knows sentences and tables. Does not know how anything was measured. Each table says in a line what its numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from train.baselines import LEAD
from train.bootstrap import format_interval
from train.data import Pair
from train.metrics import ALL_ROUGE_TYPES, ROUGE_NAMES, ROUGE_TYPES

USES = {
    "mean": "mean over all references of a row",
    "first": "the first reference of a row",
    "best": "the best reference of a row",
}
# Columns of the table of texts: heading, statistic, decimals.
STATISTICS = (
    ("words", "words", 1),
    ("tokens", "tokens", 1),
    ("new 1-grams %", "novelty_1", 1),
    ("2-grams %", "novelty_2", 1),
    ("3-grams %", "novelty_3", 1),
    ("4-grams %", "novelty_4", 1),
    ("coverage %", "coverage", 1),
    ("density", "density", 2),
    ("compression", "compression", 1),
    ("repeated 3-grams %", "repetition_3", 2),
)

_UNSET: tuple[Any, ...] = (None, (), [])


def format_report(whole: Mapping[str, Any], plots: Mapping[str, str], pairs: Sequence[Pair] | None) -> str:
    """The whole report.

    Args:
        whole: what `report.json` holds.
        plots: what each figure beside it shows, by its name.
        pairs: all rows, to show the documents and references of the samples; None to give their ids only.
    """
    report = whole["report"]
    lines = [
        *_head(whole),
        *_scores(report),
        *_figures(plots, "scores.png", "differences.png"),
        *_texts(report),
        *_figures(plots, "lengths.png", "novelty.png"),
        *_faithfulness(report),
        *_slices(report),
        *_figures(plots, "slices.png"),
        *_metrics(report),
        *_seeds(report),
        *_cost(whole),
        *_samples(whole, pairs),
        *_origin(whole),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _head(whole: Mapping[str, Any]) -> list[str]:
    model, data, settings = whole["model"], whole["data"], whole["settings"]
    title = " ".join(str(part) for part in (model["name"], model["version"]) if part)
    leaks = data["leaks_dropped"]
    all_of = "All " if leaks is None else ""
    count = f"The first {data['rows']} rows" if settings["limit"] else f"{all_of}{data['rows']} rows"
    if leaks is not None:
        count += f", {leaks} left out before whose document also stands in train"
    generation = ", ".join(f"{key} {value}" for key, value in settings["generation"].items() if value not in _UNSET)
    return [
        f"# {title} on {data['name']} ({data['split']})",
        "",
        f"{count}; SHA-256 of ids and texts `{data['sha256']}`.",
        f"Weights `{model['weights_sha256']}`, in {settings['dtype']} on {settings['device']}, "
        f"decoded by {settings['decoded_by']}.",
        "",
        f"Decoding: {generation}.",
        "",
        f"Intervals are 95 % percentile bootstrap intervals over rows ({settings['resamples']:,} resamples, seed "
        f"{settings['seed']}). Differences are paired; their p-values are two-sided, and each is for one comparison by "
        "itself.",
    ]


def _scores(report: Mapping[str, Any]) -> list[str]:
    names = [ROUGE_NAMES[kind] for kind in ALL_ROUGE_TYPES]
    lines = [
        "",
        "## ROUGE",
        "",
        "`rouge_score` F1 x 100, stemmed, against raw references. For ROUGE-Lsum texts are cut",
    ]
    lines[-1] += " into sentences at `.`, `!` and `?`."
    if len(report["scores"]) == 1:
        lines += ["The rows have one reference each: the mean over references and the first are the same."]
    for use, systems in report["scores"].items():
        lines += ["", f"Against {USES[use]}:", ""]
        lines += _table(
            ["", *names],
            ([name, *(format_interval(scores[kind]) for kind in ALL_ROUGE_TYPES)] for name, scores in systems.items()),
        )
        lines += ["", f"The model minus each, over the same rows, against {USES[use]}:", ""]
        lines += _table(
            ["", *names],
            (
                [f"minus {name}", *(_difference(found[kind]) for kind in ALL_ROUGE_TYPES)]
                for name, found in report["differences"][use].items()
            ),
        )
    lines += [
        "",
        f"lead{LEAD}: the first {LEAD} turns of a dialogue or sentences of prose. random{LEAD}: as many drawn at "
        "random (seeded). oracle: those that greedily raise ROUGE-1 and ROUGE-2 against the references most; it has "
        "seen the answer.",
    ]
    for name, about in report["against"].items():
        if "file" in about:
            same = "" if about["same_data"] else "; of another set of rows, matched by id"
            lines += ["", f"{name}: rows of the file `{about['file']}`{same}."]
    return lines


def _difference(interval: Mapping[str, Any]) -> str:
    return f"{format_interval(dict(interval))}, p = {interval['p_value']:.4f}"


def _texts(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## The texts",
        "",
        "Means over rows. New n-grams: occurrences that the source does not hold. Coverage and density after Grusky et "
        "al. 2018: the share of words in fragments copied from the source, and the mean length of a word's fragment. "
        "Compression: words of the source for each word. Repeated 3-grams: those that the text had said before. Words "
        "are runs of letters and digits, without case and accents; tokens are the model's, without special ones. Of "
        "several references the mean counts.",
        "",
    ]
    lines += _table(
        ["", *(heading for heading, _, _ in STATISTICS)],
        (
            [name, *(_mean(found[kind], digits) for _, kind, digits in STATISTICS)]
            for name, found in report["text"].items()
        ),
    )
    own = report["text"]["model"]
    lines += ["", "With intervals, for the model:", ""]
    lines += _table(
        ["", "mean", "rows"],
        (
            [
                heading if kind.startswith("novelty_1") else _full(heading, kind),
                _whole(own[kind], digits),
                _rows(own[kind]),
            ]
            for heading, kind, digits in STATISTICS
        ),
    )
    if own["empty"]:
        lines += ["", f"{own['empty']} summaries are empty."]
    lines += [""]
    lines += _table(
        ["", "outputs cut at the limit %", "sources read in part %", "generated tokens"],
        (
            [name, *(format_interval(found[key]) for key in ("outputs_at_limit", "sources_cut", "generated_tokens"))]
            for name, found in report["limits"].items()
        ),
    )
    return lines


def _full(heading: str, kind: str) -> str:
    return f"new {heading}" if kind.startswith("novelty") else heading


def _mean(interval: Mapping[str, Any] | None, digits: int) -> str:
    return "-" if interval is None else f"{interval['mean']:.{digits}f}"


def _whole(interval: Mapping[str, Any] | None, digits: int) -> str:
    return "-" if interval is None else format_interval(dict(interval), digits)


def _rows(interval: Mapping[str, Any] | None) -> str:
    return "-" if interval is None else str(interval["rows"])


def _faithfulness(report: Mapping[str, Any]) -> list[str]:
    found = report["faithfulness"]
    how = "The model writes no capitals, so all texts were read in lower case. " if found["read_in_lower_case"] else ""
    lines = [
        "",
        "## Numbers and names without a source",
        "",
        f"A proxy for faithfulness, by rule: what a text states and its source does not hold. {how}The references show "
        "what people's own summaries score; copies of the source can only score by how they are put together.",
        "",
    ]
    lines += _table(
        ["", "numbers", "not in the source", "texts with any %", "names", "not in the source", "texts with any %"],
        (
            [name, *(cell for kind in ("numbers", "names") for cell in _flags(row[kind]))]
            for name, row in found["systems"].items()
        ),
    )
    return [*lines, "", "What the rules do not see:", "", *(f"- {text}" for text in found["blind_spots"])]


def _flags(found: Mapping[str, Any]) -> list[str]:
    share = "" if found["unheld_percent"] is None else f" ({found['unheld_percent']:.1f} %)"
    return [str(found["stated"]), f"{found['unheld']}{share}", format_interval(found["texts_flagged_percent"])]


def _slices(report: Mapping[str, Any]) -> list[str]:
    names = [ROUGE_NAMES[kind] for kind in ROUGE_TYPES]
    lines = ["", "## By source length", "", f"Equal parts of the rows, against {USES[report['slice_references']]}.", ""]
    lines += _table(
        ["tokens of the source", "rows", *names, f"minus lead{LEAD}, ROUGE-2", "sources cut", "outputs at the limit"],
        (
            [
                "{} to {}".format(*part["source_tokens"]),
                part["rows"],
                *(format_interval(part["scores"][kind]) for kind in ROUGE_TYPES),
                _difference(part["minus_lead"]["rouge2"]),
                part["sources_cut"],
                part["outputs_at_limit"],
            ]
            for part in report["slices"]
        ),
    )
    return lines


def _metrics(report: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for metric in report["metrics"]:
        settings = ", ".join(f"{key} {value}" for key, value in metric["settings"].items())
        lines += ["", f"## {metric['name']}", "", f"{settings}." if settings else "", ""]
        differences = metric["differences"]
        lines += _table(
            ["", "mean", "the model minus it"],
            (
                [name, format_interval(found), _difference(differences[name]) if name in differences else ""]
                for name, found in metric["scores"].items()
            ),
        )
    return lines


def _seeds(report: Mapping[str, Any]) -> list[str]:
    found = report["seeds"]
    lines = ["", "## Seeds", ""]
    if len(found["seeds"]) == 1:
        seed = "unknown" if found["seeds"][0] is None else found["seeds"][0]
        return [
            *lines,
            f"One training run, seed {seed}. How much another seed would change the scores is not known: the intervals "
            "are over rows only.",
        ]
    kinds = list(found["mean"])
    lines += [f"The same settings with {len(found['seeds'])} seeds, against {USES[found['references']]}.", ""]
    rows = [[seed, *(f"{found['scores'][k][i]:.2f}" for k in kinds)] for i, seed in enumerate(found["seeds"])]
    rows += [[name, *(f"{found[key][k]:.2f}" for k in kinds)] for name, key in _SPREAD]
    return [*lines, *_table(["seed", *(ROUGE_NAMES[kind] for kind in kinds)], rows)]


_SPREAD = (("mean", "mean"), ("standard deviation", "standard_deviation"))


def _cost(whole: Mapping[str, Any]) -> list[str]:
    report, machine = whole["report"], whole["machine"]
    latency, training = report["latency"], report["training"]
    alone = latency["alone"]
    memory = f"{latency['peak_rss_bytes'] / 2**20:,.0f} MiB of memory at most, in the process that also held the data"
    if "peak_device_bytes" in latency:
        memory += f"; {latency['peak_device_bytes'] / 2**20:,.0f} MiB on the device"
    device = machine.get("accelerator") or machine["processor"]
    lines = [
        "",
        "## Latency, memory and cost",
        "",
        f"On {device}, {machine['cores']} cores, {machine['torch_threads']} threads, load average "
        f"{machine['load_average']} before the run, at the decode settings above:",
        "",
        f"- one summary alone: {alone['median']:.3f} s (median of {alone['rows']}; mean {alone['mean']:.3f}, worst "
        f"{alone['worst']:.3f})",
        f"- in the run over all {latency['rows_in_batch_run']} rows, in full batches: {latency['in_batch']:.3f} s a "
        "summary",
        f"- {memory}",
        f"- the run over all rows: {whole['seconds']:.1f} s",
    ]
    if "train_runtime" in training:
        epochs = f" for {training['epoch']:.3g} epochs" if "epoch" in training else ""
        lines += [f"- training: {training['train_runtime']:,.0f} s{epochs}, on the machine that trained"]
    else:
        lines += ["- training: no record of its cost was given (`--run`)"]
    return lines


def _samples(whole: Mapping[str, Any], pairs: Sequence[Pair] | None) -> list[str]:
    samples = whole["report"]["samples"]
    lines = [
        "",
        "## Samples",
        "",
        f"{len(samples['random'])} rows drawn at random (seeded, not chosen), scored against "
        f"{USES[whole['settings']['references']]}."
        + (" Documents and references are in the data set." if pairs is None else ""),
        "",
    ]
    show: Callable[[list[int]], list[str]] = (
        (lambda rows: _outputs(whole, rows)) if pairs is None else (lambda rows: _with_texts(whole, rows, pairs))
    )
    lines += show(samples["random"])
    lines += ["", "## The worst", "", "The rows with the lowest mean of ROUGE-1, 2 and L.", ""]
    return [*lines, *show(samples["worst"])]


def _outputs(whole: Mapping[str, Any], rows: Iterable[int]) -> list[str]:
    return _table(
        ["row", "summary", "R-1 / R-2 / R-L", "not in the source"],
        (
            [whole["rows"][i]["id"], whole["rows"][i]["prediction"], _row_scores(whole, i), _unheld(whole, i)]
            for i in rows
        ),
    )


def _with_texts(whole: Mapping[str, Any], rows: Iterable[int], pairs: Sequence[Pair]) -> list[str]:
    lines = []
    for i in rows:
        row = whole["rows"][i]
        lines += [f"### {row['id']}", "", f"{_row_scores(whole, i)} (R-1 / R-2 / R-L)", "", "Summary:", ""]
        lines += _quoted(row["prediction"])
        if _unheld(whole, i):
            lines += [f"Not in the source: {_unheld(whole, i)}", ""]
        for reference in pairs[i].references:
            lines += ["Reference:", "", *_quoted(reference)]
        lines += ["Document:", "", *_quoted(pairs[i].document)]
    return lines


def _row_scores(whole: Mapping[str, Any], i: int) -> str:
    return " / ".join(f"{whole['rows'][i][kind]:.1f}" for kind in ROUGE_TYPES)


def _unheld(whole: Mapping[str, Any], i: int) -> str:
    found = whole["report"]["unheld"].get(str(i), {})
    return ", ".join(word for kind in ("numbers", "names") for word in found.get(kind, ()))


def _quoted(text: str) -> list[str]:
    """Indented by four: Markdown shows it as it is."""
    return [*(f"    {line}" for line in text.splitlines()), ""]


def _origin(whole: Mapping[str, Any]) -> list[str]:
    report = whole["report"]
    versions = ", ".join(f"{name} {version}" for name, version in whole["libraries"].items())
    return [
        "",
        "## How it was made",
        "",
        "    " + (report["command"] or "(called from Python)"),
        "",
        f"Commit {report['git_commit']}; {versions}.",
    ]


def _figures(plots: Mapping[str, str], *names: str) -> list[str]:
    return [line for name in names if name in plots for line in ("", f"![{plots[name]}]({name})")]


def _table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
