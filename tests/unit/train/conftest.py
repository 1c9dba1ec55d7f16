"""A tiny random BERT with its tokenizer, a tiny data set, and one run over them: real files, no network."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from train.config import RunConfig, config_from_dict
from train.data import Pair
from train.export import export
from train.finetune import finetune

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60))]
CLS, SEP, PAD = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]"), VOCABULARY.index("[PAD]")


def make_base(folder: Path, dtype: torch.dtype = torch.float32, positions: int = 64) -> Path:
    """Save a random two-layer BERT and a tokenizer that knows w0 to w59."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
    )
    BertModel(config).to(dtype).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(folder)
    return folder


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Dialogues of random words; summaries of 3 to 6 words, two references each."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(least, most)))

    return [Pair(f"{seed}_{i}", words(5, 20), (words(3, 6), words(3, 6))) for i in range(count)]


def write_split(folder: Path, split: str, pairs: Sequence[Pair]) -> None:
    """Write one split as JSON lines, in the layout of `read_split`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": p.id, "document": p.document, "references": list(p.references)} for p in pairs]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_config(base: Path, data: Path, output_dir: Path, /, **sections: dict[str, Any] | str) -> RunConfig:
    """A run of seconds; `sections` such as `optim={"epochs": 1}` replace single values, words a value at the top."""
    table: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(output_dir),
        "model": {"encoder": str(base), "decoder": str(base), "share_embeddings": True, "hidden_dropout": 0.0},
        "data": {
            "path": str(data),
            "name": "TinySum",
            "licence": "CC BY-NC-SA 4.0",
            "non_commercial": True,
            "max_source_tokens": 64,
            "max_target_tokens": 16,
        },
        "optim": {"epochs": 2.0, "batch_size": 4, "warmup_steps": 0, "precision": "fp32", "label_smoothing": 0.0},
        "eval": {"rows": 4, "batch_size": 4},
        "generation": {"max_length": 16, "min_length": 3, "num_beams": 2},
    }
    for section, values in sections.items():
        table[section] = values if isinstance(values, str) else {**table.get(section, {}), **values}
    return config_from_dict(table)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate((("train", 16), ("validation", 4), ("test", 6))):
        write_split(folder, split, make_pairs(count, seed))
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlabelled texts of one to four sentences, in one file."""
    rng = random.Random(5)

    def sentence() -> str:
        return " ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(3, 8)))

    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": "\n".join(sentence() for _ in range(rng.randint(1, 4))), "kind": "dialogue"} for _ in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of two epochs with shared embeddings and dropout."""
    folder = tmp_path_factory.mktemp("run")
    finetune(make_config(base, data, folder, model={"hidden_dropout": 0.1}))
    return folder


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run in a model store, not evaluated."""
    return export(run, tmp_path_factory.mktemp("store"), "1.0.0")
