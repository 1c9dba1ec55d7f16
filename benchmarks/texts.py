"""DialogSum and the shipped checkpoint, as the benchmarks on real texts need them.

Knows files and the tokenizer. Does not know the engine, nor what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from app.engine import GenerationParams
from app.model_registry import find_model
from train.config import DataConfig
from train.data import Pair, read_split
from train.warm_start import load_tokenizer


def checkpoint(folder: Path | None) -> Path:
    """The folder named, or the newest model of the store, verified."""
    return folder or find_model(None, Path("model_store")).folder


def own_settings(model: Path) -> GenerationParams:
    """The checkpoint's own decode settings."""
    return GenerationParams.from_generation_config(
        json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    )


def pairs(data: str, split: str, rows: int | None) -> list[Pair]:
    """The first rows of a split, in file order."""
    return read_split(DataConfig(path=data), split)[:rows]


def source_ids(model: Path, documents: Sequence[str]) -> list[list[int]]:
    """Tokens of each document, special tokens included, cut to what the encoder takes."""
    limit = json.loads((model / "config.json").read_text(encoding="utf-8"))["encoder"]["max_position_embeddings"]
    tokenizer = load_tokenizer(str(model))
    ids: list[list[int]] = tokenizer(list(documents), truncation=True, max_length=limit)["input_ids"]
    return ids


def texts(model: Path, outputs: Sequence[Sequence[int]]) -> list[str]:
    """Outputs as text, as train.evaluate scores them."""
    tokenizer = load_tokenizer(str(model))
    return [tokenizer.decode(list(tokens), skip_special_tokens=True).strip() for tokens in outputs]
