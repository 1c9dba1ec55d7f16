"""Two processes on this machine, over gloo: the same steps, the same losses, and checkpoints that one process reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.config import RunConfig
from train.finetune import finetune
from train.resuming import STEP
from train.warm_start import load_model

from .conftest import make_config
from .steps import assert_same_steps, steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]

# Each experiment's weights go to a file of its name; rank 0 writes.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "ddp": {"batch_size": 2, "parallel": "ddp"},
    "ddp_tokens": {"batch_tokens": 80, "parallel": "ddp"},
    "ddp_checkpointing": {"batch_size": 2, "parallel": "ddp", "gradient_checkpointing": True},
    "ddp_uneven": {"batch_size": 2, "parallel": "ddp", "rows": 9, "count": 3},
    "ddp_streamed": {"batch_size": 2, "parallel": "ddp", "streaming": True},
    "fsdp": {"batch_size": 2, "parallel": "fsdp"},
    "fsdp_accumulating": {"batch_size": 1, "parallel": "fsdp", "gradient_accumulation": 2},
    "fsdp_checkpointing": {"batch_size": 2, "parallel": "fsdp", "gradient_checkpointing": True},
}
# Runs in both processes, which take longer to start than for all they do: hence in one launch. The command comes first,
# while there is no process group but what it makes itself.
SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from tests.unit.train.steps import steps
from train.__main__ import main
assert main(["finetune", "--config", sys.argv[1]]) == 0
base, data, out = map(Path, sys.argv[2:5])
for name, settings in json.loads(sys.argv[5]).items():
    weights = steps(base, data, out / "run", **settings)
    if os.environ["RANK"] == "0":
        torch.save(weights, out / f"{name}.pt")
seeds = [0, 0]
torch.distributed.all_gather_object(seeds, torch.initial_seed())
assert len(set(seeds)) == 2, "both would drop the same places"
assert torch.distributed.get_backend() == "gloo"
torch.distributed.destroy_process_group()
"""


def launch(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `steps` as a folder that can be streamed."""
    from .conftest import write_split
    from .steps import PAIRS

    folder = tmp_path_factory.mktemp("rows")
    write_split(folder, "train", PAIRS[:4])
    return folder


@pytest.fixture(scope="module")
def two_processes(base: Path, data: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of `torchrun` leave: the weights of every experiment, and in `run` what `run_config` asks."""
    folder = tmp_path_factory.mktemp("two")
    config = write_toml(run_config(base, data, folder / "run", accumulation=1), folder / "run.toml")
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    (folder / "steps").mkdir()
    said = launch(*TORCHRUN, str(script), *map(str, (config, base, rows, folder / "steps")), json.dumps(EXPERIMENTS))
    assert said.count("src mean") == 1  # the preflight, once
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_steps_of_two_processes_equal_those_of_one(name: str, two_processes: Path, base: Path, tmp_path: Path) -> None:
    shape = {key: EXPERIMENTS[name].get(key, default) for key, default in (("rows", 4), ("count", 1))}
    whole = steps(base, base, tmp_path, batch_size=4, **shape)
    assert_same_steps(torch.load(two_processes / "steps" / f"{name}.pt"), whole, base)


# One batch of two processes is two accumulated ones of one. No dropout, so that the runs can be compared. The second
# process writes fewer summaries, in fewer batches.
RUN: dict[str, dict[str, Any]] = {
    "optim": {"batch_tokens": 80, "epochs": 2.0, "learning_rate": 2e-3, "new_weights_learning_rate": 2e-3},
    "eval": {"every_steps": 2, "save_total_limit": 99, "rows": 3, "batch_size": 1},
}


def run_config(base: Path, data: Path, folder: Path, accumulation: int, parallel: str = "auto") -> RunConfig:
    optim = {**RUN["optim"], "gradient_accumulation": accumulation, "parallel": parallel}
    return make_config(base, data, folder, optim=optim, eval=RUN["eval"])


def write_toml(config: RunConfig, path: Path) -> Path:
    """Plain values in sections: all that a run's configuration has."""

    def line(key: str, value: Any) -> str:
        return f"{key} = {json.dumps(value)}\n" if value is not None else ""

    table = config.to_dict()
    text = "".join(line(key, value) for key, value in table.items() if not isinstance(value, dict))
    for name, section in table.items():
        if isinstance(section, dict):
            text += f"[{name}]\n" + "".join(line(key, value) for key, value in section.items())
    path.write_text(text, encoding="utf-8")
    return path


def losses(folder: Path) -> dict[int, float]:
    """Loss on validation by step, of the whole run as its newest checkpoint knows it."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}


def only_checkpoint(source: Path, folder: Path, step: int) -> Path:
    """A run's folder as a lost machine leaves it."""
    shutil.copytree(source / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def one(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, in this one."""
    folder = tmp_path_factory.mktemp("run") / "one"
    finetune(run_config(base, data, folder, accumulation=2))
    return folder


@pytest.fixture(scope="module")
def two(two_processes: Path) -> Path:
    """The same run by `train finetune` under torchrun, with DDP."""
    return two_processes / "run"


@pytest.fixture(scope="module")
def sharded(one: Path, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process gone on with after four steps, by `accelerate launch --use_fsdp` on two."""
    folder = only_checkpoint(one, tmp_path_factory.mktemp("run") / "sharded", 4)
    config = write_toml(run_config(base, data, folder, accumulation=1), folder.parent / "run.toml")
    words = ["--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch(*ACCELERATE, *words, "--module", "train", "finetune", "--config", str(config), "--resume")
    return folder


def assert_same_losses(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) >= 3
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=2e-5), step
    assert max(expected.values()) - min(expected.values()) > 2e-3  # many times what they may differ by: they moved


def test_a_run_of_two_processes_has_the_losses_of_a_run_of_one(one: Path, two: Path) -> None:
    assert_same_losses(losses(two), losses(one))


def test_the_first_process_alone_writes_and_names_the_number_of_processes(two: Path) -> None:
    record = json.loads((two / "best" / "run.json").read_text(encoding="utf-8"))
    assert record["processes"] == 2
    assert json.loads((two / "checkpoint-2" / STEP).read_text(encoding="utf-8"))["batches"] == 2
    assert {path.name for path in (two / "best").glob("model*")} == {"model.safetensors"}


def test_processes_agree_on_the_scores_of_one(one: Path, two: Path) -> None:
    """Each wrote summaries for half of the rows; all scored all."""
    scores = [
        [
            entry["eval_rouge2"]
            for entry in json.loads((folder / "best" / "run.json").read_text())["log"]
            if "eval_rouge2" in entry
        ]
        for folder in (one, two)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1.0)


def test_one_process_goes_on_where_two_stopped(base: Path, data: Path, two: Path, tmp_path: Path) -> None:
    folder = only_checkpoint(two, tmp_path / "resumed", 4)
    # Says 1, as the run of two did; a step stays a step.
    finetune(run_config(base, data, folder, accumulation=1), resume=True)
    assert_same_losses(losses(folder), losses(two))


def test_two_sharded_processes_go_on_where_one_stopped(one: Path, sharded: Path) -> None:
    assert_same_losses(losses(sharded), losses(one))


def test_one_process_goes_on_where_sharded_ones_stopped(
    base: Path, data: Path, one: Path, sharded: Path, tmp_path: Path
) -> None:
    folder = only_checkpoint(sharded, tmp_path / "resumed", 6)
    finetune(run_config(base, data, folder, accumulation=1), resume=True)
    assert_same_losses(losses(folder), losses(one))


def test_sharded_processes_save_a_whole_model(one: Path, sharded: Path) -> None:
    expected, found = (load_file(folder / "checkpoint-8" / "model.safetensors") for folder in (one, sharded))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    load_model(sharded / "best")
