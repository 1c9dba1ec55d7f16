"""A folder that the engine can read, of any model folder: an exported entry as it is, a run's as a copy for a while.

Knows that a run's files may hold shared weights once, that the engine wants each by its name, and where a folder says
what data it was made with. Does not know how anything is decoded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.config import DataConfig, config_from_dict
from train.evaluate import data_settings
from train.records import BEST, MANIFEST, EvaluationError, read_json
from train.warm_start import is_joined, load_model, plain_copy


def model_folder(path: Path) -> Path:
    """`path` itself, or the best model of the run whose folder it is.

    Raises:
        EvaluationError: it is neither.
    """
    for folder in (path, path / BEST):
        if (folder / "config.json").exists():
            return folder
    raise EvaluationError(f"{path} holds neither a model nor a folder {BEST} with one")


def data_of(model: Path, path: str | None = None, **columns: str | None) -> DataConfig:
    """How the data of a model were read, from its run or else its manifest, with what is given over it.

    Raises:
        EvaluationError: neither says where they are, and `path` is None.
    """
    given = {name: value for name, value in {"path": path, **columns}.items() if value is not None}
    folder = model_folder(model)
    if not (folder / "run.json").exists():
        return data_settings(folder, None, **given)
    settings = read_json(folder / "run.json")["config"]
    return config_from_dict({**settings, "data": {**settings["data"], **given}}).data


def check_servable(folder: Path) -> None:
    """Refuse a model that the engine has no network for.

    Raises:
        EvaluationError: it came whole (BART, PEGASUS).
    """
    if (folder / "config.json").exists() and not is_joined(folder):
        raise EvaluationError(f"{folder} came whole: the engine has no network for it; `train evaluate` scores it")


@contextmanager
def serving_copy(folder: Path) -> Iterator[Path]:
    """`folder` if it was exported, else a copy in fp32 with every weight by its own name, removed afterwards.

    Raises:
        WarmStartError: the folder lacks weights.
        EvaluationError: the engine has no network for it.
    """
    check_servable(folder)
    if (folder / MANIFEST).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="precis-") as name:
        copy = Path(name)
        model, tokenizer = load_model(folder)
        plain_copy(model).save_pretrained(copy)
        model.generation_config.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
        yield copy
