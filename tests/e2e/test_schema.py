"""The real server held against its own OpenAPI document by schemathesis, with data that fits it and data that does not.

What is asked, and what counts as an answer, stands in `schemathesis.toml`; a longer run in docs/reliability.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.e2e.conftest import start_server
from tests.shipped import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SECONDS = 600  # a run takes about one minute; a machine with other work on it may be slow
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def test_no_answer_contradicts_the_openapi_document(checkpoint: Path, tmp_path: Path) -> None:
    # Many hundred texts are summarised: short summaries in the fastest arithmetic, and every route as it is.
    with start_server(
        tmp_path / "log", model=checkpoint, device="cpu", dtype="int8", num_threads=1, max_output_tokens=2
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
