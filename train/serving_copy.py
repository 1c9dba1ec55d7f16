"""A folder that the engine can read, of any model folder: an exported entry as it is, a run's as a copy for a while.

Knows that a run's files may hold shared weights once, and that the engine wants each by its name. Does not know how
anything is decoded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.records import BEST, MANIFEST, EvaluationError
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


def check_servable(folder: Path) -> None:
    """Refuse a model that the engine has no network for.

    Raises:
        EvaluationError: it came whole (BART, PEGASUS).
    """
    if (folder / "config.json").exists() and not is_joined(folder):
        raise EvaluationError(
            f"{folder} came whole: the engine has no network for it; `train evaluate --through generate` scores it"
        )


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
