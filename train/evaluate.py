"""Score an exported model with the engine that serves it: `python -m train evaluate --model FOLDER`.

A baseline that came whole (BART, PEGASUS) is scored in its run's folder, with `generate` of transformers.

Knows decoding, ROUGE, the lead baseline and how sure one can be of a difference. Does not choose anything: settings
are chosen on validation and frozen into `generation_config.json` before test is scored.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from app.engine import Engine, EngineConfig, GenerationParams, SequenceOutput
from app.errors import EngineFailed
from train.baseline import decode_baseline
from train.config import DataConfig, config_from_dict
from train.data import Pair, data_hash, read_split
from train.finetune import BEST
from train.metrics import ROUGE_TYPES, References, rouge_rows
from train.warm_start import is_joined, load_tokenizer

MANIFEST = "manifest.json"
LEAD = 3
RESAMPLES = 10_000
SEED = 13
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "rouge-score", "numpy", "scipy")
# A turn of a dialogue: a short name, a colon, words.
_TURN = re.compile(r"[^:]{1,40}:\s?\S")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


class EvaluationError(ValueError):
    """Nothing can be said of this model on this data, or the engine cannot decode it; the message says why."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval; `p_value` (two-sided, of no difference) stands on differences only."""

    mean: float
    low: float
    high: float
    p_value: float | None = None


def data_settings(model: Path, run: Path | None = None, **given: str | None) -> DataConfig:
    """How the data are read: as the manifest says they were for training, with what is `given` over it.

    Args:
        run: the folder of the run: its `run.json` has the whole path of the data, the manifest only a folder's end.
        given: fields of `DataConfig`; None is not given.

    Raises:
        EvaluationError: nothing says where the data are.
    """
    data = dict(_manifest(model).get("settings", {}).get("data", {}))
    if run is not None:
        data["path"] = _run_record(run)["config"]["data"]["path"]
    data |= {name: value for name, value in given.items() if value is not None}
    if "path" not in data:
        raise EvaluationError(f"{model} does not say what data it was trained on; give --data")
    return config_from_dict({"name": model.name, "data": data}).data


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
    pairs = read_split(data, split)[:limit]
    if len(pairs) < 2:
        raise EvaluationError("intervals need at least two rows")
    params = own_params(model)
    engine = build_engine(model, params, device, dtype) if is_joined(model) else None
    print(f"{model}: {len(pairs)} rows of {data.path} ({split})", file=sys.stderr, flush=True)
    started = time.monotonic()
    documents, progress = [pair.document for pair in pairs], show_progress(len(pairs))
    if engine is None:
        print("The engine has no network for it: `generate` of transformers decodes.", file=sys.stderr, flush=True)
        predictions, truncated = decode_baseline(model, documents, progress, device, dtype)
    else:
        predictions, truncated = decode(model, engine, documents, params, progress)
    seconds = time.monotonic() - started
    manifest = _manifest(model)
    return {
        "model": {
            "name": manifest.get("name", model.name),
            "version": manifest.get("version"),
            "weights_sha256": weights_hash(model),
        },
        "data": {"name": Path(data.path).name, "split": split, "rows": len(pairs), "sha256": data_hash(pairs)},
        "settings": {
            "references": references,
            "limit": limit,
            "generation": asdict(params),
            "decoded_by": "generate of transformers" if engine is None else "the engine",
            "rouge": "rouge_score F1 x 100, stemmed, raw references",
            "lead": LEAD,
            "resamples": RESAMPLES,
            "seed": SEED,
            "device": device,
            "dtype": dtype,
        },
        "truncated_sources": truncated,
        "seconds": round(seconds, 1),
        **score(predictions, pairs, references),
        "libraries": library_versions(),
    }


def own_params(model: Path) -> GenerationParams:
    """The decode options of the model's `generation_config.json`.

    Raises:
        EvaluationError: one is out of range, or the engine does not have it.
    """
    try:
        return GenerationParams.from_generation_config(read_json(model / "generation_config.json"))
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{model / 'generation_config.json'}: {error}") from error


def build_engine(model: Path, params: GenerationParams, device: str = "cpu", dtype: str = "float32") -> Engine:
    """An engine wide and long enough for `params`.

    Raises:
        CheckpointError: the folder cannot be served.
    """
    widest = max(8, params.num_beams, params.num_return_sequences)
    config = EngineConfig(max_num_beams=widest, max_output_tokens=params.max_new_tokens, device=device, dtype=dtype)
    return Engine.from_folder(model, config)


def run_engine(
    engine: Engine,
    sources: Sequence[Sequence[int]],
    params: GenerationParams,
    on_finished: Callable[[int], None] | None = None,
) -> list[SequenceOutput]:
    """`engine.generate`.

    Raises:
        EvaluationError: a source or an option is beyond the engine's limits, or a step failed.
    """
    try:
        return engine.generate(sources, params, on_finished=on_finished)
    except (ValueError, EngineFailed) as error:
        raise EvaluationError(f"the engine: {error}") from error


def decode(
    model: Path,
    engine: Engine,
    documents: Sequence[str],
    params: GenerationParams,
    on_finished: Callable[[int], None] | None = None,
) -> tuple[list[str], int]:
    """Summaries in input order, and how many documents were cut to the model's source limit."""
    tokenizer = load_tokenizer(str(model))
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    limit = engine.info.max_source_tokens
    truncated = sum(len(tokens) > limit for tokens in ids)
    if truncated:
        ids = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in documents]
    # Longest first: running slots then hold sources of like length.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    outputs = run_engine(engine, [ids[i] for i in order], params, on_finished)
    summaries = [""] * len(ids)
    for i, output in zip(order, outputs, strict=True):
        summaries[i] = tokenizer.decode(output.hypotheses[0].token_ids, skip_special_tokens=True).strip()
    return summaries, truncated


def score(predictions: Sequence[str], pairs: Sequence[Pair], references: References) -> dict[str, Any]:
    """Scores of the predictions and of the lead baseline with intervals, their paired difference, and every row."""
    options = [pair.references for pair in pairs]
    rows = rouge_rows(predictions, options, references)
    lead_rows = rouge_rows([lead(pair.document) for pair in pairs], options, references)
    return {
        "scores": {
            "model": {name: asdict(mean_interval(rows[name])) for name in ROUGE_TYPES},
            f"lead{LEAD}": {name: asdict(mean_interval(lead_rows[name])) for name in ROUGE_TYPES},
        },
        "difference": {name: asdict(paired_difference(rows[name], lead_rows[name])) for name in ROUGE_TYPES},
        "mean_words": {
            "model": round(mean(len(text.split()) for text in predictions), 1),
            f"lead{LEAD}": round(mean(len(lead(pair.document).split()) for pair in pairs), 1),
            "references": round(mean(len(pair.references[0].split()) for pair in pairs), 1),
        },
        "rows": [
            {"id": pair.id, "prediction": text, **{name: round(rows[name][i], 2) for name in ROUGE_TYPES}}
            for i, (pair, text) in enumerate(zip(pairs, predictions, strict=True))
        ],
    }


def lead(document: str, count: int = LEAD) -> str:
    """The baseline: the first `count` turns (lines) of a dialogue, or the first `count` sentences of prose.

    A document is a dialogue when more than half of its lines, and at least two, begin like `Name: words`.
    Sentences end at `.`, `!` or `?` before a space, so abbreviations count as ends too.
    """
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    turns = sum(_TURN.match(line) is not None for line in lines)
    if turns >= 2 and 2 * turns > len(lines):
        return "\n".join(lines[:count])
    return " ".join(_SENTENCE_END.split(" ".join(lines))[:count])


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % percentile bootstrap interval over rows (seeded)."""
    result = _bootstrap(values)
    low, high = result.confidence_interval
    return Interval(round(float(np.mean(values)), 2), round(float(low), 2), round(float(high), 2))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of `values - baseline` over the same rows, its 95 % interval and the two-sided bootstrap p-value.

    Rows are drawn in pairs, so what makes a row easy for both cancels out (Koehn 2004, EMNLP). The p-value is twice
    the share of resamples on the other side of zero, and never below what that many resamples can show.
    """
    differences = np.subtract(values, baseline)
    result = _bootstrap(differences.tolist())
    low, high = result.confidence_interval
    drawn = result.bootstrap_distribution
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))
    return Interval(
        mean=round(float(differences.mean()), 2),
        low=round(float(low), 2),
        high=round(float(high), 2),
        p_value=round(p_value, 5),
    )


def format_table(result: dict[str, Any]) -> str:
    """The scores with their intervals and the difference, one line each."""
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    lines = [f"{'':<12}" + "".join(f"{name:>25}" for name in names.values()) + f"{'words':>8}"]
    for system, scores in result["scores"].items():
        cells = "".join(f"{format_interval(scores[name]):>25}" for name in names)
        lines.append(f"{system:<12}{cells}{result['mean_words'][system]:>8}")
    lines.append(f"{'difference':<12}" + "".join(f"{format_interval(result['difference'][n]):>25}" for n in names))
    lines.append(f"{'p-value':<12}" + "".join(f"{result['difference'][n]['p_value']:>25.4f}" for n in names))
    lines.append(
        f"{result['data']['rows']} rows ({result['data']['split']}), references: {result['settings']['references']}, "
        f"{result['mean_words']['references']} words each; [95 % bootstrap interval]; "
        f"{result['truncated_sources']} sources cut; {result['seconds']} s"
    )
    return "\n".join(lines)


def format_interval(interval: dict[str, float]) -> str:
    """`41.20 [40.10, 42.30]`."""
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def weights_hash(model: Path) -> str:
    """SHA-256 over the weight files in name order: ties an evaluation to the weights it was made with."""
    digest = sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
        EvaluationError: it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path} is not a JSON object")
    return found


def library_versions() -> dict[str, str]:
    """What computed a result: Python and the libraries that may change it."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _bootstrap(values: Sequence[float]) -> Any:
    return bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=SEED)


def _manifest(model: Path) -> dict[str, Any]:
    if not model.is_dir():
        raise EvaluationError(f"{model} is not a folder")
    return read_json(model / MANIFEST) if (model / MANIFEST).exists() else {}


def _run_record(run: Path) -> dict[str, Any]:
    for path in (run / "run.json", run / BEST / "run.json"):
        if path.exists():
            return read_json(path)
    raise EvaluationError(f"{run} has no run.json; is it the folder of a run that has ended?")


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
