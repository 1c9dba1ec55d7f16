"""Score a model on a split: `python -m train evaluate --model FOLDER [--report DIR]`.

Knows the order of things: read rows, summarise, score against the references and the lead baseline. What a report says
beyond that is `train.report`'s business. Does not choose anything: settings are chosen on validation and frozen into
`generation_config.json` before test is scored.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from train.baselines import LEAD, lead
from train.bootstrap import RESAMPLES, SEED, format_interval, mean_interval, paired_difference
from train.config import DataConfig, config_from_dict
from train.data import Pair, data_hash, document_key, read_split, unscorable_references
from train.metrics import ROUGE_NAMES, ROUGE_TYPES, References, format_unscorable, rouge_rows
from train.records import (
    RUN,
    EvaluationError,
    identity,
    library_versions,
    machine,
    peak_memory,
    read_json,
    read_manifest,
    read_run,
    weights_hash,
)
from train.serving_copy import model_folder, serving_copy
from train.summarise import (
    Summariser,
    Summary,
    build_engine,
    engine_summariser,
    generate_summariser,
    own_params,
)
from train.warm_start import is_joined

Through = Literal["auto", "engine", "generate"]
DECODED_BY = {"engine": "the engine", "generate": "generate of transformers"}


@dataclass(frozen=True)
class Rows:
    """The rows of a split that are scored.

    Attributes:
        leaks_dropped: rows left out because train has their document; None where nobody looked.
    """

    pairs: list[Pair]
    data: DataConfig
    split: str
    limit: int | None = None
    leaks_dropped: int | None = None


@dataclass(frozen=True)
class Evaluated:
    """What one model says of some rows, and how that came about.

    Attributes:
        summarise: to ask it again.
        facts: of the model and the run of it, as plain data for a JSON file.
    """

    model: Path
    rows: Rows
    summaries: list[Summary]
    summarise: Summariser
    facts: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """The summaries without what is known of them."""
        return [summary.text for summary in self.summaries]


def data_settings(model: Path, run: Path | None = None, **given: str | None) -> DataConfig:
    """How the data are read: as the manifest, or the run, says they were for training, with what is `given` over it.

    Args:
        model: an exported folder, or a run's.
        run: the folder of the run: its `run.json` has the whole path of the data, the manifest only a folder's end.
        given: fields of `DataConfig`; None is not given.

    Raises:
        EvaluationError: nothing says where the data are.
    """
    model = model_folder(model)
    if run is None and (model / RUN).exists():
        run = model
    of_run = {} if run is None else read_run(run)["config"]["data"]
    data = {**of_run, **read_manifest(model).get("settings", {}).get("data", {})}
    if run is not None:
        data["path"] = of_run["path"]
    data["streaming"] = False  # what is scored is held in memory
    data |= {name: value for name, value in given.items() if value is not None}
    if "path" not in data:
        raise EvaluationError(f"{model} does not say what data it was trained on; give --data")
    return config_from_dict({"name": model.name, "data": data}).data


def read_rows(data: DataConfig, split: str = "test", limit: int | None = None, drop_leaks: bool = False) -> Rows:
    """The first rows of a split, those left out whose document also stands in train if asked for.

    References that ROUGE has no tokens for get a warning on stderr.

    Raises:
        EvaluationError: fewer than two rows.
        DataError: the data cannot be read.
    """
    pairs = read_split(data, split)
    dropped = None
    if drop_leaks:
        known = {document_key(pair.document) for pair in read_split(data, "train")}
        kept = [pair for pair in pairs if document_key(pair.document) not in known]
        pairs, dropped = kept, len(pairs) - len(kept)
    pairs = pairs[:limit]
    if len(pairs) < 2:
        raise EvaluationError(f"intervals need at least two rows; there are {len(pairs)}")
    if count := unscorable_references(pairs):
        print(format_unscorable(count, split), file=sys.stderr, flush=True)
    return Rows(pairs, data, split, limit, dropped)


def summarise_rows(
    model: Path,
    rows: Rows,
    device: str = "cpu",
    dtype: str = "float32",
    through: Through = "auto",
    summarise: Summariser | None = None,
) -> Evaluated:
    """Let a model say its summaries of the rows.

    Args:
        model: an exported folder, or a run's.
        rows: what it reads.
        device: where the model runs.
        dtype: what it computes in.
        through: the serving engine, or `generate`; "auto" is the engine for two checkpoints joined into one, and
            `generate` for a model that came whole (BART, PEGASUS), which the engine has no network for.
        summarise: another way to its summaries; `through` is then not looked at.

    Raises:
        EvaluationError: it cannot be decoded.
        CheckpointError: the engine cannot serve it.
        WarmStartError: a run's folder lacks weights.
    """
    model = model_folder(model)
    if through == "auto":
        through = "engine" if is_joined(model) else "generate"
    if summarise is not None:
        decoded_by, generation = "its caller", _generation_file(model)
    elif through == "generate":
        decoded_by, generation = DECODED_BY[through], _generation_file(model)
        summarise = generate_summariser(model, device, dtype)
    else:
        params = own_params(model)
        decoded_by, generation = DECODED_BY[through], asdict(params)
        with serving_copy(model) as servable:
            summarise = engine_summariser(model, build_engine(servable, params, device, dtype), params)
    pairs, data = rows.pairs, rows.data
    found = machine(device)
    print(
        f"{model}: {len(pairs)} rows of {data.path} ({rows.split}), decoded by {decoded_by}",
        file=sys.stderr,
        flush=True,
    )
    started = time.monotonic()
    summaries = summarise([pair.document for pair in pairs], show_progress(len(pairs)))
    seconds = time.monotonic() - started
    memory = peak_memory(device)
    facts = {
        "model": {**identity(model), "weights_sha256": weights_hash(model)},
        "data": {
            "name": Path(data.path).name,
            "split": rows.split,
            "rows": len(pairs),
            "sha256": data_hash(pairs),
            "leaks_dropped": rows.leaks_dropped,
        },
        "settings": {
            "limit": rows.limit,
            "generation": generation,
            "decoded_by": decoded_by,
            "rouge": "rouge_score F1 x 100, stemmed, raw references",
            "lead": LEAD,
            "resamples": RESAMPLES,
            "seed": SEED,
            "device": device,
            "dtype": dtype,
        },
        "truncated_sources": sum(summary.source_cut for summary in summaries),
        "seconds": round(seconds, 1),
        "memory": memory,
        "machine": found,
    }
    return Evaluated(model, rows, summaries, summarise, facts)


def evaluate(
    model: Path,
    data: DataConfig,
    split: str = "test",
    references: References = "first",
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Summaries, scores, intervals and the difference to the lead baseline, as plain data for a JSON file.

    Raises:
        EvaluationError: fewer than two rows, or the engine cannot decode them.
        DataError: the data cannot be read.
    """
    return scored(summarise_rows(model, read_rows(data, split, limit), device, dtype), references)


def scored(evaluated: Evaluated, references: References = "first") -> dict[str, Any]:
    """What `--output` holds: facts, scores and every row."""
    facts = evaluated.facts
    return {
        **facts,
        "settings": {"references": references, **facts["settings"]},
        **score(evaluated.texts, evaluated.rows.pairs, references),
        "libraries": library_versions(),
    }


def score(predictions: Sequence[str], pairs: Sequence[Pair], references: References) -> dict[str, Any]:
    """Scores of the predictions and of the lead baseline with intervals, their paired difference, and every row."""
    options = [pair.references for pair in pairs]
    rows = rouge_rows(predictions, options, references)
    leads = [lead(pair.document) for pair in pairs]
    lead_rows = rouge_rows(leads, options, references)
    return {
        "scores": {
            "model": {name: asdict(mean_interval(rows[name])) for name in ROUGE_TYPES},
            f"lead{LEAD}": {name: asdict(mean_interval(lead_rows[name])) for name in ROUGE_TYPES},
        },
        "difference": {name: asdict(paired_difference(rows[name], lead_rows[name])) for name in ROUGE_TYPES},
        "mean_words": {
            "model": round(mean(len(text.split()) for text in predictions), 1),
            f"lead{LEAD}": round(mean(len(text.split()) for text in leads), 1),
            "references": round(mean(len(pair.references[0].split()) for pair in pairs), 1),
        },
        "rows": [
            {"id": pair.id, "prediction": text, **{name: round(rows[name][i], 2) for name in ROUGE_TYPES}}
            for i, (pair, text) in enumerate(zip(pairs, predictions, strict=True))
        ],
    }


def format_table(result: dict[str, Any]) -> str:
    """The scores with their intervals and the difference, one line each."""
    lines = [f"{'':<12}" + "".join(f"{ROUGE_NAMES[name]:>25}" for name in ROUGE_TYPES) + f"{'words':>8}"]
    for system, scores in result["scores"].items():
        cells = "".join(f"{format_interval(scores[name]):>25}" for name in ROUGE_TYPES)
        lines.append(f"{system:<12}{cells}{result['mean_words'][system]:>8}")
    difference = result["difference"]
    lines.append(f"{'difference':<12}" + "".join(f"{format_interval(difference[n]):>25}" for n in ROUGE_TYPES))
    lines.append(f"{'p-value':<12}" + "".join(f"{difference[n]['p_value']:>25.4f}" for n in ROUGE_TYPES))
    lines.append(
        f"{result['data']['rows']} rows ({result['data']['split']}), references: {result['settings']['references']}, "
        f"{result['mean_words']['references']} words each; [95 % bootstrap interval]; "
        f"{result['truncated_sources']} sources cut; {result['seconds']} s"
    )
    return "\n".join(lines)


def _generation_file(model: Path) -> dict[str, Any]:
    """The decode settings as the file has them, where the engine's reading of them is not asked for."""
    path = model / "generation_config.json"
    return read_json(path) if path.exists() else {}


def show_progress(total: int) -> Callable[[int], None]:
    """Shows the number of finished rows on stderr, at most every five seconds."""
    started = shown = time.monotonic()

    def on_finished(finished: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if finished == total or now - shown >= 5:
            shown = now
            rate = finished / max(now - started, 1e-9)
            left = (total - finished) / rate
            print(f"{finished}/{total} rows, {rate:.1f} a second, {left:.0f} s left", file=sys.stderr, flush=True)

    return on_finished
