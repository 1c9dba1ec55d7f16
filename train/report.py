"""Everything a report says, as plain data: `build_report`; and into a folder: `write_report`.

Knows which measures there are and over which rows. Does not know how they look (`report_markdown`, `report_plots`).
`report.json` holds ids and what models said, never a document or a reference: a data set's licence may not let its
texts be copied.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Literal

import numpy as np

from train.baselines import LEAD
from train.bootstrap import SEED, mean_interval, paired_difference
from train.data import Pair
from train.evaluate import Evaluated
from train.export import git_commit
from train.faithfulness import BLIND_SPOTS, Found, Names, check_numbers
from train.metrics import ALL_ROUGE_TYPES, ROUGE_TYPES, References, rouge_rows
from train.records import RUN, EvaluationError, read_manifest, read_run, settings_of
from train.report_markdown import format_report
from train.report_plots import draw
from train.scorers import Scorer
from train.systems import System, baselines, named_apart
from train.text_statistics import coverage, density, novelty, repetition, words
from train.warm_start import load_tokenizer

MODEL = "model"
REFERENCES = "references"
RANDOM_SAMPLES = 20
WORST_SAMPLES = 10
SLICES = 4
HISTOGRAM_BINS = 20
Samples = Literal["full", "ids"]


def build_report(
    evaluated: Evaluated,
    against: Sequence[System] = (),
    seeds: Sequence[Evaluated] = (),
    metrics: Sequence[tuple[str, Mapping[str, str], Scorer]] = (),
    run: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """All measures, each mean over rows with its 95 % interval.

    Args:
        evaluated: the model and the rows.
        against: earlier checkpoints on the same rows.
        seeds: models of the same settings with other seeds, on the same rows.
        metrics: further ones, from `train.scorers.load_scorer`.
        run: the folder of the run, for what the training cost.
        command: what was typed.

    Raises:
        EvaluationError: `seeds` are not of the same settings, or not of other seeds.
    """
    pairs = evaluated.rows.pairs
    options = [pair.references for pair in pairs]
    uses: tuple[References, ...] = ("mean", "first") if any(len(found) > 1 for found in options) else ("first",)
    own = System(MODEL, evaluated.texts, evaluated.summaries)
    systems = named_apart([own, *baselines(pairs), *against])
    rouge = {use: {s.name: rouge_rows(s.texts, options, use, ALL_ROUGE_TYPES) for s in systems} for use in uses}
    chosen = _samples(rouge[uses[0]][MODEL])
    said = {system.name: [[text] for text in system.texts] for system in systems}
    said[REFERENCES] = [list(found) for found in options]
    faithfulness, unheld = _faithfulness(said, pairs)
    return {
        "scores": {
            use: {name: _intervals(rows, ALL_ROUGE_TYPES) for name, rows in found.items()}
            for use, found in rouge.items()
        },
        "differences": {
            use: {
                name: {kind: asdict(paired_difference(found[MODEL][kind], rows[kind])) for kind in ALL_ROUGE_TYPES}
                for name, rows in found.items()
                if name != MODEL
            }
            for use, found in rouge.items()
        },
        "text": _text(said, evaluated),
        "word_histogram": _histogram(said),
        "limits": {system.name: _limits(system) for system in systems if system.summaries},
        "faithfulness": faithfulness,
        "unheld": unheld,
        "slices": _slices(evaluated, rouge[uses[0]]),
        "slice_references": uses[0],
        "metrics": [_metric(entry, systems, pairs) for entry in metrics],
        "seeds": _seeds([evaluated, *seeds], uses[0]),
        "latency": _latency(evaluated, chosen["random"]),
        "training": _training(evaluated.model, run),
        "samples": chosen,
        "against": {system.name: system.about for system in systems if system.about},
        "command": command,
        "git_commit": git_commit(),
    }


def write_report(
    folder: Path, result: Mapping[str, Any], report: Mapping[str, Any], pairs: Sequence[Pair], samples: Samples
) -> None:
    """Write `report.json`, the plots and `report.md`.

    Args:
        folder: made if it is not there; files of these names in it are written over.
        result: what `--output` holds (`train.evaluate.scored`).
        report: what `build_report` says.
        pairs: the rows.
        samples: "full" shows documents and references of the samples in `report.md`; "ids" only their ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**result, "report": report}
    (folder / "report.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plots = draw(whole, folder)
    texts = pairs if samples == "full" else None
    (folder / "report.md").write_text(format_report(whole, plots, texts), encoding="utf-8")


def _intervals(rows: Mapping[str, Sequence[float]], kinds: Sequence[str]) -> dict[str, Any]:
    return {kind: asdict(mean_interval(rows[kind])) for kind in kinds}


def _interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Over the rows that have a value; None where fewer than two have."""
    found = [value for value in values if value is not None]
    return {**asdict(mean_interval(found)), "rows": len(found)} if len(found) > 1 else None


def _samples(rows: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """Row numbers: drawn at random (seeded), and those with the lowest mean of ROUGE-1, 2 and L."""
    count = len(rows[ROUGE_TYPES[0]])
    order = sorted(range(count), key=lambda i: (sum(rows[kind][i] for kind in ROUGE_TYPES), i))
    drawn = random.Random(SEED).sample(range(count), min(RANDOM_SAMPLES, count))
    return {"random": sorted(drawn), "worst": order[:WORST_SAMPLES]}


def _text(said: Mapping[str, Sequence[Sequence[str]]], evaluated: Evaluated) -> dict[str, Any]:
    """Statistics of each system; where a row has several texts (references), their mean counts. Shares in percent."""
    tokenizer = load_tokenizer(str(evaluated.model))
    sources = [words(pair.document) for pair in evaluated.rows.pairs]
    found: dict[str, Any] = {}
    for name, rows in said.items():
        values: dict[str, list[float | None]] = {}
        for texts, source in zip(rows, sources, strict=True):
            measured = [_statistics(text, source, tokenizer) for text in texts]
            for kind in measured[0]:
                there = [one[kind] for one in measured if one[kind] is not None]
                values.setdefault(kind, []).append(mean(there) if there else None)
        found[name] = {kind: _interval(row) for kind, row in values.items()}
        found[name]["empty"] = sum(not text.strip() for texts in rows for text in texts)
    return found


def _statistics(text: str, source: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    own = words(text)
    share = {f"novelty_{n}": novelty(own, source, n) for n in (1, 2, 3, 4)}
    share |= {"coverage": coverage(own, source), "repetition_3": repetition(own)}
    return {
        "words": len(own),
        "tokens": len(tokenizer(text_target=text, add_special_tokens=False, verbose=False)["input_ids"]),
        "compression": len(source) / len(own) if own else None,
        **{kind: None if value is None else 100 * value for kind, value in share.items()},
        "density": density(own, source),
    }


def _histogram(said: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, Any]:
    """How many texts have how many words, of the model and of the references."""
    counts = {name: [len(words(text)) for texts in said[name] for text in texts] for name in (MODEL, REFERENCES)}
    edges = np.histogram_bin_edges([count for row in counts.values() for count in row], bins=HISTOGRAM_BINS)
    found = {name: np.histogram(row, bins=edges)[0].tolist() for name, row in counts.items()}
    return {"edges": [round(float(edge), 2) for edge in edges], **found}


def _limits(system: System) -> dict[str, Any]:
    """Percent of outputs cut at the greatest length, and of sources read in part."""
    summaries = system.summaries or []
    return {
        "outputs_at_limit": asdict(mean_interval([100.0 * summary.at_limit for summary in summaries])),
        "sources_cut": asdict(mean_interval([100.0 * summary.source_cut for summary in summaries])),
        "generated_tokens": asdict(mean_interval([float(summary.tokens) for summary in summaries])),
    }


def _faithfulness(
    said: Mapping[str, Sequence[Sequence[str]]], pairs: Sequence[Pair]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers and names without a source, for each system and by row for the model.

    Where the model writes no capitals all are read in lower case, so that one rule judges all.
    """
    cased = any(c.isupper() for texts in said[MODEL] for text in texts for c in text)
    names = Names(text for pair in pairs for text in (pair.document, *pair.references))
    kinds = {"numbers": check_numbers, "names": names.check}
    found: dict[str, Any] = {"read_in_lower_case": not cased, "blind_spots": list(BLIND_SPOTS), "systems": {}}
    unheld: dict[str, Any] = {}
    for system, rows in said.items():
        checked: dict[str, list[list[Found]]] = {
            kind: [
                [check(text if cased else text.lower(), pair.document) for text in texts]
                for texts, pair in zip(rows, pairs, strict=True)
            ]
            for kind, check in kinds.items()
        }
        found["systems"][system] = {kind: _counts(row) for kind, row in checked.items()}
        if system == MODEL:
            for i in range(len(pairs)):
                flagged = {kind: list(row[i][0].unheld) for kind, row in checked.items() if row[i][0].unheld}
                if flagged:
                    unheld[str(i)] = flagged
    return found, unheld


def _counts(rows: Sequence[Sequence[Found]]) -> dict[str, Any]:
    texts = [found for row in rows for found in row]
    stated, unheld = sum(len(f.stated) for f in texts), sum(len(f.unheld) for f in texts)
    return {
        "stated": stated,
        "unheld": unheld,
        "unheld_percent": round(100 * unheld / stated, 2) if stated else None,
        "texts_flagged_percent": asdict(mean_interval([100 * mean(bool(f.unheld) for f in row) for row in rows])),
    }


def _slices(evaluated: Evaluated, rouge: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Quarters of the rows by source length in the model's tokens; fewer parts where there are fewer than 8 rows."""
    lengths = [summary.source_tokens for summary in evaluated.summaries]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    found = []
    for part in np.array_split(order, min(SLICES, len(order) // 2)):
        rows = [int(i) for i in part]
        values = {kind: [rouge[MODEL][kind][i] for i in rows] for kind in ROUGE_TYPES}
        leads = {kind: [rouge[f"lead{LEAD}"][kind][i] for i in rows] for kind in ROUGE_TYPES}
        found.append(
            {
                "source_tokens": [lengths[rows[0]], lengths[rows[-1]]],
                "rows": len(rows),
                "scores": _intervals(values, ROUGE_TYPES),
                "minus_lead": {kind: asdict(paired_difference(values[kind], leads[kind])) for kind in ROUGE_TYPES},
                "sources_cut": sum(evaluated.summaries[i].source_cut for i in rows),
                "outputs_at_limit": sum(evaluated.summaries[i].at_limit for i in rows),
            }
        )
    return found


def _metric(
    entry: tuple[str, Mapping[str, str], Scorer], systems: Sequence[System], pairs: Sequence[Pair]
) -> dict[str, Any]:
    name, settings, scorer = entry
    documents, references = [pair.document for pair in pairs], [pair.references for pair in pairs]
    rows = {system.name: scorer.score(system.texts, documents, references) for system in systems}
    for system, values in rows.items():
        if len(values) != len(pairs):
            raise EvaluationError(f"--metric {name} gave {len(values)} scores for {len(pairs)} rows of {system}")
    return {
        "name": name,
        "settings": {key: Path(value).name if "/" in value else value for key, value in settings.items()},
        "scores": {system: asdict(mean_interval(values)) for system, values in rows.items()},
        "differences": {
            system: asdict(paired_difference(rows[MODEL], values)) for system, values in rows.items() if system != MODEL
        },
    }


def _seeds(models: Sequence[Evaluated], use: References) -> dict[str, Any]:
    """Scores of each seed with their mean and standard deviation; of one seed only which it is."""
    settings = [settings_of(one.model) for one in models]
    seeds = [found.get("optim", {}).get("seed") for found in settings]
    if len(models) == 1:
        return {"seeds": seeds}
    if None in seeds or len(set(seeds)) < len(seeds):
        raise EvaluationError(f"--seeds: models of other seeds are needed; the seeds are {seeds}")
    first, *others = [_without_seed(found) for found in settings]
    for one, other in zip(models[1:], others, strict=True):
        if other != first:
            differing = sorted(key for key in {**first, **other} if first.get(key) != other.get(key))
            raise EvaluationError(f"--seeds: {one.model} was trained with other settings: {', '.join(differing)}")
    pairs = models[0].rows.pairs
    options = [pair.references for pair in pairs]
    rows = [rouge_rows(one.texts, options, use, ALL_ROUGE_TYPES) for one in models]
    means = {kind: [mean(row[kind]) for row in rows] for kind in ALL_ROUGE_TYPES}
    return {
        "seeds": seeds,
        "references": use,
        "models": [one.facts["model"] for one in models],
        "scores": {kind: [round(value, 2) for value in values] for kind, values in means.items()},
        "mean": {kind: round(mean(values), 2) for kind, values in means.items()},
        "standard_deviation": {kind: round(stdev(values), 2) for kind, values in means.items()},
    }


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, without what tells one run of a series from another."""
    kept = {key: value for key, value in settings.items() if key not in ("name", "output_dir")}
    return {**kept, "optim": {key: value for key, value in kept.get("optim", {}).items() if key != "seed"}}


def _latency(evaluated: Evaluated, chosen: Sequence[int]) -> dict[str, Any]:
    """Seconds of one summary with nothing else running, tokenisation included, and in the run over all rows."""
    documents = [evaluated.rows.pairs[i].document for i in chosen]
    evaluated.summarise(documents[:1])  # warm
    alone = []
    for text in documents:
        started = time.perf_counter()
        evaluated.summarise([text])
        alone.append(time.perf_counter() - started)
    count = len(evaluated.rows.pairs)
    return {
        "alone": {
            "rows": len(alone),
            "mean": round(mean(alone), 4),
            "median": round(median(alone), 4),
            "worst": round(max(alone), 4),
        },
        "in_batch": round(evaluated.facts["seconds"] / count, 4),
        "rows_in_batch_run": count,
        **evaluated.facts["memory"],
    }


def _training(model: Path, run: Path | None) -> dict[str, Any]:
    """What the training cost, from the run or else the manifest; empty where neither says."""
    if run is None and (model / RUN).exists():
        run = model
    record = read_run(run).get("train", {}) if run is not None else {}
    found: dict[str, Any] = record or read_manifest(model).get("training", {}).get("train", {})
    return found
