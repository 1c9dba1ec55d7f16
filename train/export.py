"""From a fine-tuned run to an entry of the model store: `python -m train export --run RUN --store model_store ...`.

Knows the store's layout, the manifest, and the proof that the engine says what `generate` says. Does not know how a
model was trained, the words of its card, nor how the server finds it. Scores come later: export, evaluate, then `card`.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import EncoderDecoderModel

from app.engine.checkpoint import DECODER_TOKENIZER
from train.card import format_card, is_folder, short_name
from train.config import DataConfig, config_from_dict
from train.data import Pair, read_split
from train.records import BEST, MANIFEST, library_versions, read_json, weights_hash
from train.summarise import build_engine, decode, own_params, run_engine
from train.tokenizer_pair import AnyTokenizer, TokenizerPair, summary_tokenizer
from train.warm_start import is_joined, load_model, load_tokenizer, plain_copy, source_limit

SHARD_SIZE = "48MB"
CARD = "README.md"
TOKENIZER = "tokenizer.json"
PARITY_ROWS = 16
SAMPLES = 3
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class ExportError(ValueError):
    """The model must not be shipped as it is; the message says why. No half-written folder stays behind."""


def export(
    run: Path,
    store: Path,
    version: str,
    data_path: str | None = None,
    evaluations: Sequence[Path] = (),
    parity_rows: int = PARITY_ROWS,
    name: str | None = None,
) -> Path:
    """Write `store/<name>/<version>` in fp16 and prove it before it is left there.

    Args:
        run: the output folder of a run, or a model folder of its own (then `data_path` is needed).
        store: the model store.
        version: X.Y.Z; an entry that exists is never overwritten.
        data_path: where the data are now, if not where the run read them.
        evaluations: files written by `train evaluate` on these weights.
        parity_rows: rows of the validation split on which the engine and `generate` are compared.
        name: of the entry; by default the run's.

    Returns:
        The folder written.

    Raises:
        ExportError: a name or version that cannot be, an entry that exists, missing weights, or a disagreement.
    """
    source = run / BEST if (run / BEST / "config.json").exists() else run
    if not (source / "config.json").exists():
        raise ExportError(f"{run} holds neither a model nor a folder {BEST} with one")
    record = read_json(source / "run.json") if (source / "run.json").exists() else {}
    name = name or record.get("config", {}).get("name") or run.resolve().name
    if record and "preflight" not in record:
        raise ExportError(f"{source} is a first stage's, which knows no summaries: export the run that goes on from it")
    for value, pattern, what in ((name, _NAME, "name"), (version, _VERSION, "version")):
        if not pattern.fullmatch(value):
            raise ExportError(f"{value!r} is not a {what} ({pattern.pattern})")
    if parity_rows < 1:
        raise ExportError("at least one row must be compared")
    pairs = read_split(_data_config(record, data_path), "validation")
    final = store / name / version
    if final.exists():
        raise ExportError(f"{final} exists; a version is written once")
    if not is_joined(source):
        raise ExportError(
            f"{source} came whole, as a baseline: the engine has no network for it, so it is not shipped. Score it "
            f"where it is: python -m train evaluate --model {source}"
        )
    model, tokenizer = load_model(source)
    # Hidden until it is proven: a server that starts meanwhile does not see it.
    folder = final.with_name(f".{version}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        write_model(plain_copy(model), tokenizer, folder)
        written = reload(folder)
        documents = [pair.document for pair in pairs[:parity_rows]]
        ties = check_parity(written, load_tokenizer(str(folder)), folder, documents)
        manifest = {
            "name": name,
            "version": version,
            "files": {},
            "tokenizers": {
                "source": TOKENIZER,
                "summary": f"{DECODER_TOKENIZER}/{TOKENIZER}" if isinstance(tokenizer, TokenizerPair) else TOKENIZER,
            },
            "data": _data_record(record),
            "settings": _portable(record.get("config", {})),
            "metrics": {},
            "parity": {"rows": len(documents), "split": "validation", "dtype": "float32", "settled_in_float64": ties},
            "parameters": sum(parameter.numel() for parameter in written.parameters()),
            # What both sides share counts once here, and is there twice in the file.
            "trained_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "training": {key: record[key] for key in ("train", "best_metric", "preflight", "average") if key in record},
            "samples": sample_outputs(folder, pairs[:SAMPLES]),
            "git_commit": git_commit(),
            "libraries": library_versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_card(folder, manifest, evaluations)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder.rename(final)


def card(
    folder: Path,
    evaluations: Sequence[Path],
    elsewhere: Mapping[str, Path] | None = None,
    limits: Sequence[str] | None = None,
) -> Path:
    """Put evaluations into an exported folder: its card, its metrics and the card's hash in its manifest.

    Args:
        elsewhere: evaluations on data that it was not made for, by the data's name.
        limits: sentences on where it fails, in place of those that the card has.

    Raises:
        ExportError: no manifest, or an evaluation of other weights.
    """
    if not (folder / MANIFEST).exists():
        raise ExportError(f"{folder} has no {MANIFEST}; was it exported?")
    manifest = read_json(folder / MANIFEST)
    found = manifest.setdefault("elsewhere", {})
    found |= {name: _evaluation(path, folder) for name, path in (elsewhere or {}).items()}
    if limits is not None:
        manifest["limits"] = list(limits)
    write_card(folder, manifest, evaluations)
    return folder / CARD


def write_model(model: EncoderDecoderModel, tokenizer: AnyTokenizer, folder: Path) -> None:
    """fp16 weights in shards, config, decode settings and the tokenizers, which neither cut nor pad.

    Raises:
        ExportError: a weight that fp16 cannot hold.
    """
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    if not largest < torch.finfo(torch.float16).max:
        raise ExportError(f"a weight is {largest}: fp16 cannot hold it")
    for config in (model.config, model.config.encoder, model.config.decoder):
        config._name_or_path = short_name(config._name_or_path)
    model.half().save_pretrained(folder, max_shard_size=SHARD_SIZE)
    model.generation_config.save_pretrained(folder)
    # What is truncated is the server's decision, not the tokenizer's.
    tokenizer.model_max_length = source_limit(model)
    for one in {id(one): one for one in (tokenizer, summary_tokenizer(tokenizer))}.values():
        one.backend_tokenizer.no_truncation()
        one.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    # safetensors writes for its owner alone; the server may run as somebody else.
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


def reload(folder: Path) -> EncoderDecoderModel:
    """What was written, as stock `transformers` reads it, in fp32.

    Raises:
        ExportError: missing, unexpected or mismatched weights.
    """
    model, loading = EncoderDecoderModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            raise ExportError(f"{folder}: {problem} {sorted(map(str, loading[problem]))[:3]}")
    return model.eval()


def check_parity(model: EncoderDecoderModel, tokenizer: AnyTokenizer, folder: Path, documents: Sequence[str]) -> int:
    """The engine, reading `folder`, must say the very tokens that `generate` says, with the model's own settings.

    Texts go through `generate` one at a time, unpadded; the engine batches them as it does when serving. Where two
    hypotheses are closer than fp32 can tell, an fp64 copy of the model arbitrates, and it must side with the engine.

    Returns:
        The number of rows that were settled in fp64.

    Raises:
        ExportError: they disagree on a row, and fp64 is not with the engine.
    """
    params = own_params(folder)
    engine = build_engine(folder, params)
    sources = tokenizer(list(documents), truncation=True, max_length=engine.info.max_source_tokens)["input_ids"]
    outputs = run_engine(engine, sources, params)
    exact: EncoderDecoderModel | None = None
    ties = 0
    for row, (ids, output) in enumerate(zip(sources, outputs, strict=True)):
        expected = generated_tokens(model, ids)
        found = list(output.hypotheses[0].token_ids)
        if found == expected:
            continue
        exact = copy.deepcopy(model).double() if exact is None else exact
        if generated_tokens(exact, ids) != found:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), "the end")
            raise ExportError(
                f"row {row} of validation: engine and generate differ from token {at} on, and generate in fp64 does "
                f"not side with the engine; engine: {tokenizer.decode(found)}; generate: {tokenizer.decode(expected)}"
            )
        ties += 1
    return ties


@torch.inference_mode()
def generated_tokens(model: EncoderDecoderModel, source: Sequence[int]) -> list[int]:
    """What `generate` says of one source: start token off, nothing after the end token."""
    ids = torch.tensor([list(source)])  # [1, N]
    row = model.generate(ids, attention_mask=torch.ones_like(ids))[0, 1:].tolist()
    eos = model.generation_config.eos_token_id
    return row[: row.index(eos) + 1] if eos in row else row


def sample_outputs(folder: Path, pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """Row ids and summaries; the documents stay where they are, for their licence may not let them be copied."""
    params = own_params(folder)
    summaries, _ = decode(folder, build_engine(folder, params), [pair.document for pair in pairs], params)
    return [{"id": pair.id, "summary": text} for pair, text in zip(pairs, summaries, strict=True)]


def write_card(folder: Path, manifest: dict[str, Any], evaluations: Sequence[Path]) -> None:
    """Write the card and the manifest, with the hash of every file but the manifest itself."""
    for path in evaluations:
        result = _evaluation(path, folder)
        manifest["metrics"][result["data"]["split"]] = result
    (folder / CARD).write_text(format_card(manifest), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in files
    }
    # Written aside and renamed: a reader sees the old manifest or the new one.
    aside = folder / f"{MANIFEST}.tmp"
    aside.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(folder / MANIFEST)


def _evaluation(path: Path, folder: Path) -> dict[str, Any]:
    """What `evaluate` wrote of this model, without the rows."""
    result = read_json(path)
    if result.get("model", {}).get("weights_sha256") != weights_hash(folder):
        raise ExportError(f"{path} is an evaluation of other weights than those of {folder}")
    return {key: result[key] for key in result if key != "rows"}


def git_commit() -> str:
    """The commit of the code, `-dirty` when the package differs from it, `unknown` outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".", "../app") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _data_config(record: dict[str, Any], data_path: str | None) -> DataConfig:
    if record:
        data = config_from_dict(record["config"]).data
        return replace(data, path=data_path) if data_path else data
    if not data_path:
        raise ExportError("there is no run.json that says where the data are; give --data")
    return DataConfig(path=data_path, name=Path(data_path).name)


def _data_record(record: dict[str, Any]) -> dict[str, Any]:
    """Name, licence, and for each split its rows and hash as they were used."""
    if not record:
        return {"name": "unknown data", "licence": "unknown", "non_commercial": False, "splits": {}}
    data, train = record["config"]["data"], record["preflight"]["train"]
    return {
        **{key: data[key] for key in ("name", "licence")},
        "non_commercial": any(source["non_commercial"] for source in [data, *record.get("sources", [])]),
        "sources": record.get("sources", []),
        "splits": record["data"],
        "leaks": train["leaks"],
        "dropped": train["dropped"],
    }


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without the folders of the machine that trained."""
    if not config:
        return {}
    model = dict(config["model"])
    for side in ("encoder", "decoder"):
        if not is_folder(model[side]):
            model[f"{side}_name"] = model[side]
        model[side] = short_name(model[side])
    if model.get("init_from"):
        model["init_from"] = short_name(model["init_from"])
    kept = {key: value for key, value in config.items() if key != "output_dir"}
    if kept.get("denoising", {}).get("path"):
        kept["denoising"] = {**kept["denoising"], "path": short_name(kept["denoising"]["path"])}
    if kept.get("ranking", {}).get("paths"):
        kept["ranking"] = {**kept["ranking"], "paths": [short_name(path) for path in kept["ranking"]["paths"]]}
    data = {**config["data"], "path": short_name(config["data"]["path"])}
    data["extra"] = [{**extra, "path": short_name(extra["path"])} for extra in data.get("extra", ())]
    return {**kept, "model": model, "data": data}
