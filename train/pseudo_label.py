"""Summaries of a stronger model as targets for a smaller one: `python -m train pseudo-label --model FOLDER ...`.

Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947; Shleifer and Rush 2020, arXiv:2010.13002). Knows the
file it writes, which is a train split. Does not know the student.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import DataConfig
from train.data import COMPRESSIONS, FORMATS, data_hash, read_split, suffix_of
from train.evaluate import show_progress
from train.provenance import TEACHER, sources_of
from train.records import MANIFEST, EvaluationError, read_json, weights_hash
from train.serving_copy import model_folder, serving_copy
from train.summarise import build_engine, decode, own_params


def pseudo_label(
    model: Path,
    data: DataConfig,
    output: Path,
    split: str = "train",
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write `output`, a row `{"id", "document", "summary"}` for each document, and `teacher.json` beside it.

    The teacher decodes with its own settings. A document of which it says nothing is left out.

    Args:
        model: an exported folder, or a run's.
        output: FILE.jsonl or FILE.jsonl.xz, which must not exist.

    Returns:
        What `teacher.json` holds: the teacher, its settings, its data's licences, the documents' hash, and counts.

    Raises:
        EvaluationError: the output exists or is no such file, or the engine cannot decode.
        DataError: the data cannot be read.
    """
    if FORMATS.get(suffix_of(output)) != "json" or output.suffix == ".gz":
        raise EvaluationError(f"--output must end in .jsonl or .jsonl.xz; it is {output}")
    beside = output.with_name(TEACHER)
    for path in (output, beside):
        if path.exists():
            raise EvaluationError(f"{path} exists; pseudo-labels are written once, one teacher a folder")
    pairs = read_split(data, split)[:limit]
    folder = model_folder(model)
    params = own_params(folder)
    documents = [pair.document for pair in pairs]
    with serving_copy(folder) as servable:
        engine = build_engine(servable, params, device, dtype)
        summaries, truncated = decode(servable, engine, documents, params, show_progress(len(pairs)))
    rows = [
        {"id": pair.id, "document": pair.document, "summary": summary}
        for pair, summary in zip(pairs, summaries, strict=True)
        if summary
    ]
    record = {
        **_teacher(folder),
        "weights_sha256": weights_hash(folder),
        "generation": asdict(params),
        "data": {"name": Path(data.path).name, "split": split, "rows": len(pairs), "sha256": data_hash(pairs)},
        "rows": len(rows),
        "empty_summaries": len(pairs) - len(rows),
        "truncated_sources": truncated,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # Written aside and renamed: a run that reads the folder meanwhile sees no half of a file.
    aside = output.with_name(f".{output.name}.partial")
    aside.write_bytes(lzma.compress(lines) if output.suffix in COMPRESSIONS else lines)
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(output)
    return record


def _teacher(folder: Path) -> dict[str, Any]:
    """Name, version and the data that went into it, as its manifest or its run says."""
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST)
        return {"name": manifest["name"], "version": manifest["version"], "sources": sources_of(folder)}
    record = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    name = record.get("config", {}).get("name", folder.name)
    return {"name": name, "version": None, "sources": sources_of(folder)}
