"""What ties a result to what made it: the files beside a model and a run, hashes, versions, the machine.

Knows their names and how they are read. Does not know what a model says, nor how it is scored.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
# Of a run that has ended, in its folder or in the folder of its best model (train.finetune).
RUN = "run.json"
BEST = "best"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "rouge-score", "numpy", "scipy")


class EvaluationError(ValueError):
    """Nothing can be said of this model on this data, or it cannot be decoded; the message says why."""


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
        EvaluationError: it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path} is not a JSON object")
    return found


def read_manifest(model: Path) -> dict[str, Any]:
    """The manifest of an exported folder; empty where there is none.

    Raises:
        EvaluationError: no such folder, or the manifest is not a JSON object.
    """
    if not model.is_dir():
        raise EvaluationError(f"{model} is not a folder")
    return read_json(model / MANIFEST) if (model / MANIFEST).exists() else {}


def read_run(run: Path) -> dict[str, Any]:
    """The record of a run that has ended, from its folder or from the folder of its best model.

    Raises:
        EvaluationError: there is none.
    """
    for path in (run / RUN, run / BEST / RUN):
        if path.exists():
            return read_json(path)
    raise EvaluationError(f"{run} has no {RUN}; is it the folder of a run that has ended?")


def identity(model: Path) -> dict[str, Any]:
    """`name` and `version` of a model folder, as its manifest says, or its run, which has no version."""
    if (model / MANIFEST).exists():
        manifest = read_json(model / MANIFEST)
        return {"name": manifest.get("name", model.name), "version": manifest.get("version")}
    record = read_json(model / RUN) if (model / RUN).exists() else {}
    return {"name": record.get("config", {}).get("name", model.name), "version": None}


def settings_of(model: Path) -> dict[str, Any]:
    """What a model folder was trained with, by section: its manifest says it, or its run; empty where neither does."""
    found: dict[str, Any] = read_manifest(model).get("settings", {})
    return found or (read_json(model / RUN).get("config", {}) if (model / RUN).exists() else {})


def weights_hash(model: Path) -> str:
    """SHA-256 over the weight files in name order: ties an evaluation to the weights it was made with."""
    digest = sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """What computed a result: Python and the libraries that may change it."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads, memory, load at this moment and, where one is used, the accelerator."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device.startswith("cuda"):
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def peak_memory(device: str = "cpu") -> dict[str, int]:
    """Bytes: the most this process ever held, and on CUDA the most that torch held there."""
    scale = 1 if sys.platform == "darwin" else 1024  # getrusage counts in KiB, except there
    found = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if device.startswith("cuda"):
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
