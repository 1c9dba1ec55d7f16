"""The mean of several checkpoints' weights, kept only if validation says so: `python -m train average --run RUN`.

Knows weight files and the comparison. Does not know how the checkpoints were trained. After Polyak and Juditsky 1992;
for Transformers, Vaswani et al. 2017 (arXiv:1706.03762) average the last checkpoints.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from app.engine.checkpoint import DECODER_TOKENIZER
from train.added_tokens import same_vocabulary
from train.bootstrap import format_interval, paired_difference
from train.data import Pair, read_split
from train.evaluate import data_settings, show_progress
from train.metrics import ROUGE_TYPES, rouge_rows
from train.provenance import sources_of_all
from train.records import BEST, RUN, EvaluationError, read_json, weights_hash
from train.serving_copy import check_servable, serving_copy
from train.summarise import build_engine, decode, own_params
from train.tokenizer_pair import load_tokenizer

AVERAGE = "average"
# Where the best single checkpoint goes when the average takes its place.
SINGLE = "best-single"
NOT_OF_A_MODEL = ("trainer_state.json", RUN, "manifest.json", "model.safetensors.index.json")
# As during training: the checkpoint that is kept is the one with the best ROUGE-2.
CHOICE = "rouge2"


def average_run(run: Path, last: int, data_path: str | None = None, rows: int | None = None) -> dict[str, Any]:
    """Average a run's last checkpoints, compare with its best on validation, and let the better one be `best`.

    The average stays in `run/average` if it is not better; if it is, it becomes `run/best`, and what was there is
    `run/best-single`.

    Args:
        last: how many checkpoints; the run keeps as many as `eval.save_total_limit` says.
        data_path: where the data are now, if not where the run read them.
        rows: of validation, from the first; None is all.

    Returns:
        `checkpoints`, `scores` of both, `difference` (average minus best, with its interval), and `kept`.

    Raises:
        EvaluationError: fewer checkpoints than asked for, weights that do not fit, or no `best`.
    """
    best = run / BEST
    check_servable(best)
    checkpoints = last_checkpoints(run, last)
    if not (best / "run.json").exists():
        raise EvaluationError(f"{run} has no {BEST}/run.json; has the run ended?")
    record = read_json(best / "run.json")
    if "average" in record:
        single = f"; the best single checkpoint is {run / SINGLE}" if (run / SINGLE).exists() else ""
        raise EvaluationError(f"{best} is an average already{single}")
    if (run / SINGLE).exists():
        raise EvaluationError(f"{run / SINGLE} is left from an earlier run in this folder; move it away")
    pairs = read_split(data_settings(best, path=data_path), "validation")[:rows]
    if len(pairs) < 2:
        raise EvaluationError("a comparison needs at least two rows of validation")
    shutil.rmtree(run / AVERAGE, ignore_errors=True)
    folder = average(checkpoints, run / AVERAGE)
    # Both are decoded alike, also where settings were frozen after training.
    shutil.copy(best / "generation_config.json", folder)
    scores = {BEST: _score(best, pairs), AVERAGE: _score(folder, pairs)}
    kept = AVERAGE if _mean(scores[AVERAGE][CHOICE]) > _mean(scores[BEST][CHOICE]) else BEST
    result = {
        "checkpoints": [path.name for path in checkpoints],
        "validation_rows": len(pairs),
        "scores": {name: {r: round(_mean(values[r]), 2) for r in ROUGE_TYPES} for name, values in scores.items()},
        "difference": {
            name: asdict(paired_difference(scores[AVERAGE][name], scores[BEST][name])) for name in ROUGE_TYPES
        },
        "kept": kept,
    }
    _forget_single(record)
    (folder / "run.json").write_text(json.dumps({**record, "average": result}, indent=1) + "\n", encoding="utf-8")
    if kept == AVERAGE:
        best.rename(run / SINGLE)
        folder.rename(best)
    return result


def last_checkpoints(run: Path, last: int) -> list[Path]:
    """The newest checkpoints of a run, oldest first.

    Raises:
        EvaluationError: the run does not have so many, or fewer than two are asked for.
    """
    found = {int(match[1]): path for path in run.glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))}
    if last < 2 or len(found) < last:
        raise EvaluationError(
            f"{run} has {len(found)} checkpoints, and {last} were asked for (at least 2); a run keeps as many as "
            "eval.save_total_limit says"
        )
    return [found[step] for step in sorted(found)[-last:]]


def average(folders: Sequence[Path], output: Path) -> Path:
    """Write `output`: the first folder's config, decode settings and tokenizer, with the mean weights of all, in fp32.

    A file holds shared weights once, so they are averaged once, and the model that reads them shares them again. If the
    first is a run's, the average has that run's record, with the data of all, and `average` naming them: runs that
    began at the same weights and differ in their seed, say (Wortsman et al. 2022, arXiv:2203.05482).

    Raises:
        EvaluationError: a folder without weights, weights of another name or shape, another vocabulary, or an `output`
                that exists.
    """
    if len(folders) < 2:
        raise EvaluationError(f"an average needs at least two checkpoints; it has {len(folders)}")
    if output.exists():
        raise EvaluationError(f"{output} exists; an average is written into a new folder")
    weights = mean_weights(folders)
    _check_vocabularies([folder for folder in folders if (folder / "tokenizer.json").exists()])
    output.mkdir(parents=True)
    for file in folders[0].iterdir():
        if file.suffix in (".json", ".txt", ".model") and file.name not in NOT_OF_A_MODEL:
            shutil.copy(file, output / file.name)
    if (folders[0] / DECODER_TOKENIZER).is_dir():
        shutil.copytree(folders[0] / DECODER_TOKENIZER, output / DECODER_TOKENIZER)
    save_file(weights, output / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    if record := _run_record(folders[0]):
        names, hashes = [_name(folder) for folder in folders], [weights_hash(folder) for folder in folders]
        record |= {"sources": sources_of_all(folders), "average": {"checkpoints": names, "weights_sha256": hashes}}
        _forget_single(record)
        (output / RUN).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return output


def mean_weights(folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of each weight over the folders: summed in fp64, given in fp32. One weight is in memory at a time.

    Raises:
        EvaluationError: as `average`.
    """
    places = [_places(folder) for folder in folders]
    for folder, found in zip(folders[1:], places[1:], strict=True):
        if found.keys() != places[0].keys():
            names = sorted(found.keys() ^ places[0].keys())
            raise EvaluationError(f"{folder} and {folders[0]} do not have the same weights: {', '.join(names[:3])}")
    means = {}
    for name in places[0]:
        tensors = [_read(found[name], name) for found in places]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise EvaluationError(f"{name} has several shapes in {', '.join(map(str, folders))}: {sorted(shapes)}")
        total = torch.zeros_like(tensors[0], dtype=torch.float64)
        for tensor in tensors:
            total += tensor
        means[name] = (total / len(tensors)).float().contiguous()
    return means


def format_comparison(result: dict[str, Any]) -> str:
    """Both scores, the difference with its interval, and what was kept."""
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    lines = [f"{'':<12}" + "".join(f"{name:>24}" for name in names.values())]
    for system, scores in result["scores"].items():
        lines.append(f"{system:<12}" + "".join(f"{scores[name]:>24.2f}" for name in names))
    lines.append(f"{'difference':<12}" + "".join(f"{format_interval(result['difference'][n]):>24}" for n in names))
    better = "better, and is now" if result["kept"] == AVERAGE else "not better than"
    lines.append(
        f"The average of {', '.join(result['checkpoints'])} is {better} {BEST}: ROUGE-2 over "
        f"{result['validation_rows']} rows of validation, [95 % bootstrap interval]."
    )
    return "\n".join(lines)


def _score(folder: Path, pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """ROUGE of each row against its first reference, decoded with the model's own settings."""
    params = own_params(folder)
    with serving_copy(folder) as servable:
        engine = build_engine(servable, params)
        documents = [pair.document for pair in pairs]
        summaries, _ = decode(servable, engine, documents, params, show_progress(len(pairs)))
    return rouge_rows(summaries, [pair.references for pair in pairs])


def _run_record(folder: Path) -> dict[str, Any]:
    """Of the run whose best model or checkpoint it is; empty where there is none."""
    paths = (folder / RUN, folder.parent / BEST / RUN)
    return next((read_json(path) for path in paths if path.exists()), {})


def _check_vocabularies(folders: Sequence[Path]) -> None:
    for folder in folders[1:]:
        if not same_vocabulary(load_tokenizer(str(folders[0])), load_tokenizer(str(folder))):
            raise EvaluationError(f"{folder} and {folders[0]} do not have the same vocabulary: ids mean other words")


def _forget_single(record: dict[str, Any]) -> None:
    """What a run's record says of the one checkpoint that it kept is not so of an average."""
    for name in ("best_metric", "best_checkpoint"):
        record.pop(name, None)


def _name(folder: Path) -> str:
    """A run's for its best model, else the folder's own."""
    return folder.resolve().parent.name if folder.name == BEST else folder.name


def _places(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds each weight."""
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            places |= dict.fromkeys(weights.keys(), file)
    if not places:
        raise EvaluationError(f"{folder} has no *.safetensors file")
    return places


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as weights:
        tensor: torch.Tensor = weights.get_tensor(name)
    return tensor


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
