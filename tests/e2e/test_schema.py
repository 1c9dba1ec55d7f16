"""The real server held against its own OpenAPI document by schemathesis, with data that fits it and data that does not.

What is asked, and what counts as an answer, stands in `schemathesis.toml`; a longer run in docs/reliability.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import EncoderDecoderConfig, EncoderDecoderModel, GenerationConfig

from tests.e2e.conftest import start_server
from tests.shipped import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SECONDS = 600  # a run takes a minute or two; a machine with other work on it may be slow
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def small_copy(shipped: Path, folder: Path) -> Path:
    """The same tokenizer, limits and settings around a random network that takes no time: one narrow layer a side."""
    config = EncoderDecoderConfig.from_pretrained(shipped)
    for side in (config.encoder, config.decoder):
        side.update({"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2})
    torch.manual_seed(0)
    model = EncoderDecoderModel(config)
    model.generation_config = GenerationConfig.from_pretrained(shipped)
    model.save_pretrained(folder)
    for file in shipped.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_no_answer_contradicts_the_openapi_document(checkpoint: Path, tmp_path: Path) -> None:
    # Thousands of texts are summarised, and what the summaries say is not asked.
    model = small_copy(checkpoint, tmp_path / checkpoint.parent.name / checkpoint.name)
    with start_server(
        tmp_path / "log", model=model, device="cpu", dtype="int8", num_threads=1, max_output_tokens=2
    ) as server:
        document = server.client.get("/openapi.json").json()
        operations = sum(len(path) for path in document["paths"].values())
        tool = Path(sys.executable).with_name("schemathesis")
        run = subprocess.run(
            [
                *(tool, "--config-file", ROOT / "schemathesis.toml", "run", f"{server.url}/openapi.json"),
                *("--checks", "all", "--phases", ",".join(PHASES)),
                *("--max-examples", "5", "--seed", "1", "--no-color"),
            ],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"Tested: {operations}\n" in run.stdout, run.stdout
    for phase in PHASES:
        assert re.search(rf"✅ {phase.title()}\b", run.stdout), run.stdout


def test_no_check_and_no_phase_is_switched_off() -> None:
    config = tomllib.loads((ROOT / "schemathesis.toml").read_text(encoding="utf-8"))
    assert config["generation"]["mode"] == "all"
    assert not {"operations", "phases", "suppress-health-check", "baseline", "hooks", "project"} & set(config)
    assert all(set(check) == {"expected-statuses"} for check in config["checks"].values())
    accepted = config["checks"]["positive_data_acceptance"]["expected-statuses"]
    assert set(accepted) == {"2xx", 413, 422, 429}
