"""One tiny checkpoint for the tests that need any engine rather than many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save, tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hugging Face layout whose outputs are long enough to tell sequences apart."""
    return save(tiny_model(seed=3), tmp_path_factory.mktemp("tiny"))
