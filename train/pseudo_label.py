"""Summaries of stronger models as targets for another: `python -m train pseudo-label --model FOLDER [FOLDER ...]`.

Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947; Shleifer and Rush 2020, arXiv:2010.13002). Knows the
file it writes, which is a train split. Does not know the student, nor how several summaries become one.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from app.engine import GenerationParams
from train.config import DataConfig
from train.consensus import Choice
from train.data import COMPRESSIONS, FORMATS, data_hash, read_documents, read_split, suffix_of
from train.evaluate import show_progress
from train.provenance import TEACHER, sources_of_all
from train.records import EvaluationError, identity, weights_hash
from train.serving_copy import model_folder, serving_copy
from train.summarise import build_engine, decode_candidates, own_params


def pseudo_label(
    models: Sequence[Path],
    data: DataConfig,
    output: Path,
    split: str = "train",
    limit: int | None = None,
    candidates: int = 1,
    closest_to_reference: bool = False,
    keep_candidates: bool = False,
    generation: Mapping[str, Any] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write `output`, a row `{"id", "document", "summary"}` for each document, and `teacher.json` beside it.

    Each teacher decodes with its own settings and gives its `candidates` best summaries. Of more than one in all the
    consensus is written, or, if asked for, the closest to the first reference. A document of which nothing is said is
    left out.

    Args:
        models: exported folders, or runs'.
        data: labelled or not; references are read only if they are asked for.
        keep_candidates: a row also has `candidates`, all that was said of its document, each text once.
        generation: options over the teachers' own, as in `generation_config.json`.
        output: FILE.jsonl or FILE.jsonl.xz, which must not exist.
        device: where the teachers run.
        dtype: what they compute in.

    Returns:
        What `teacher.json` holds: the teachers, their settings, their data's licences, the documents' hash, and counts.

    Raises:
        EvaluationError: the output exists or is no such file, there are fewer beams than candidates, or the engine
            cannot decode.
        DataError: the data cannot be read.
    """
    if FORMATS.get(suffix_of(output)) != "json" or output.suffix == ".gz":
        raise EvaluationError(f"--output must end in .jsonl or .jsonl.xz; it is {output}")
    beside = output.with_name(TEACHER)
    for path in (output, beside):
        if path.exists():
            raise EvaluationError(f"{path} exists; pseudo-labels are written once, one set of teachers a folder")
    if keep_candidates and len(models) * candidates < 2:
        raise EvaluationError("--keep-candidates needs several summaries of a document: more --candidates, or teachers")
    folders = [model_folder(model) for model in models]
    settings = [_settings(folder, candidates, generation or {}) for folder in folders]
    documents = (read_split if closest_to_reference else read_documents)(data, split)[:limit]
    texts = [pair.document for pair in documents]
    said: list[list[str]] = [[] for _ in documents]
    teachers = []
    for folder, params in zip(folders, settings, strict=True):
        found, truncated = _said(folder, params, texts, device, dtype)
        for summaries, more in zip(said, found, strict=True):
            summaries += [summary for summary in more if summary]
        teachers.append(
            {
                **identity(folder),
                "weights_sha256": weights_hash(folder),
                "generation": asdict(params),
                "truncated_sources": truncated,
            }
        )
    choice = Choice()
    rows = [
        {
            "id": pair.id,
            "document": pair.document,
            "summary": choice.nearest(summaries, pair.references[:1] if closest_to_reference else summaries),
            **({"candidates": list(dict.fromkeys(summaries))} if keep_candidates else {}),
        }
        for pair, summaries in zip(documents, said, strict=True)
        if summaries
    ]
    record = {
        "teachers": teachers,
        "device": device,
        "dtype": dtype,
        "choice": "closest to the reference" if closest_to_reference else "consensus",
        "sources": sources_of_all(folders),
        "data": {
            "name": Path(data.path).name,
            "split": split,
            "rows": len(documents),
            "documents_sha256": data_hash(replace(pair, references=()) for pair in documents),
        },
        "rows": len(rows),
        "empty_summaries": len(documents) - len(rows),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # Written aside and renamed: a run that reads the folder meanwhile sees no half of a file.
    aside = output.with_name(f".{output.name}.partial")
    aside.write_bytes(lzma.compress(lines) if output.suffix in COMPRESSIONS else lines)
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(output)
    return record


def _said(
    folder: Path, params: GenerationParams, texts: Sequence[str], device: str, dtype: str
) -> tuple[list[list[str]], int]:
    """One teacher's summaries of each text, and how many texts it could not read to their end."""
    with serving_copy(folder) as servable:
        engine = build_engine(servable, params, device, dtype)
        return decode_candidates(servable, engine, texts, params, show_progress(len(texts)))


def _settings(folder: Path, candidates: int, generation: Mapping[str, Any]) -> GenerationParams:
    params = own_params(folder, generation)
    if not 1 <= candidates <= params.num_beams:
        raise EvaluationError(
            f"--candidates must be from 1 to the {params.num_beams} beams of {folder}; it is {candidates}"
        )
    return replace(params, num_return_sequences=candidates)
