"""`docker compose --profile train run train`: a tiny base becomes an entry of a store, by `python -m train`'s words."""

from __future__ import annotations

import os
from pathlib import Path

from tests.container.conftest import docker_ok
from tests.unit.train.conftest import make_base, make_pairs, write_split

UID = 10001


def test_the_training_container_finetunes_exports_and_evaluates(tmp_path: Path) -> None:
    data, runs, store = (tmp_path / name for name in ("data", "runs", "store"))
    (make_base(data / "base") / "model.safetensors").chmod(0o644)  # saved for its owner only
    for seed, split in enumerate(("train", "validation", "test")):
        write_split(data, split, make_pairs(16, seed))
    for folder in (runs, store):
        folder.mkdir()
        folder.chmod(0o777)  # for the container's user; `PRECIS_UID=$(id -u)` is the other way
    folders = {"PRECIS_DATA": str(data), "PRECIS_RUNS": str(runs), "PRECIS_MODEL_STORE": str(store)}

    def train(words: str) -> str:
        command = ["compose", "-p", f"precis-train-{os.getpid()}", "--profile", "train", "run", "--rm", "-T", "train"]
        return docker_ok(*command, *words.split(), timeout=300, environment=folders)

    train(
        "finetune --config train/configs/dialogsum-minilm.toml name=tiny output_dir=runs/tiny "
        "model.encoder=data/base model.decoder=data/base data.path=data data.max_source_tokens=64 "
        "data.max_target_tokens=16 optim.epochs=1 optim.batch_size=4 optim.warmup_steps=0 eval.rows=4 "
        "generation.max_length=16 generation.min_length=3 generation.num_beams=2"
    )
    train("export --run runs/tiny/best --store model_store --version 0.0.1 --parity-rows 4")
    table = train("evaluate --model model_store/tiny/0.0.1 --run runs/tiny --output runs/tiny/test.json")
    assert "rouge" in table.lower()
    assert (store / "tiny" / "0.0.1" / "manifest.json").stat().st_uid == UID
