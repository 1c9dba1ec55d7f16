"""A tiny student learns from what the shipped checkpoint, our own earlier one, says of a few documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from tests.shipped import CONVERSATIONS, shipped_folder
from train.__main__ import main
from train.config import config_from_dict
from train.data import read_split
from train.finetune import finetune


@pytest.mark.slow
def test_a_student_is_trained_on_pseudo_labels_of_the_shipped_checkpoint(tmp_path: Path) -> None:
    teacher = shipped_folder()
    assert teacher is not None, "model_store/ holds no checkpoint, and the repository ships one"
    data, labels = tmp_path / "data", tmp_path / "labels"
    data.mkdir()
    rows = [{"document": text, "summary": "A talk."} for text in CONVERSATIONS]
    # One document a split: the student may not learn from what it is validated on.
    for split, row in zip(("train", "validation", "test"), rows, strict=True):
        (data / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    everything = data / "all.jsonl"
    everything.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    words = ["pseudo-label", "--model", str(teacher), "--data", str(everything)]
    assert main([*words, "--output", str(labels / "train.jsonl.xz")]) == 0
    config = config_from_dict(
        {
            "name": "student",
            "output_dir": str(tmp_path / "run"),
            "model": dict.fromkeys(("encoder", "decoder"), str(student(teacher, tmp_path / "student"))),
            "data": {
                "path": str(data),
                "name": "Talks",
                "weight": 0.0,
                "extra": [{"path": str(labels), "name": "pseudo-labels", "weight": 2.0}],
            },
            "optim": {"epochs": 1.0, "batch_size": 2, "warmup_steps": 0, "precision": "fp32"},
            "eval": {"rows": 1},
            "generation": {"max_length": 8, "num_beams": 1},
        }
    )
    found = read_split(config.data, "train")
    assert len(found) == 1  # its own
    record = json.loads((finetune(config) / "run.json").read_text(encoding="utf-8"))
    assert record["extra"]["pseudo-labels"]["leaks"] == {"validation": 1, "test": 1}
    assert record["data"]["train"]["rows"] == 2
    of_teacher = {source["name"]: source["non_commercial"] for source in record["sources"]}
    assert of_teacher["DialogSum"] is True
    said = read_split(config_from_dict({"name": "a", "data": {"path": str(labels)}}).data, "train")
    assert [pair.document for pair in said] == list(CONVERSATIONS)
    assert "jacket" in said[0].references[0].lower() or "money" in said[0].references[0].lower()


def student(teacher: Path, folder: Path) -> Path:
    """An untrained BERT of one layer with the teacher's vocabulary."""
    vocabulary = json.loads((teacher / "config.json").read_text(encoding="utf-8"))["encoder"]["vocab_size"]
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
    )
    BertModel(config).save_pretrained(folder)
    for file in teacher.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder
