"""One tiny checkpoint for the tests that need any engine rather than many; and processors to be taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from app.engine import kernels
from app.engine.cpu_kernels import compiled
from tests.cpu_builds import BUILDS, HERE
from tests.tiny import save, tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hugging Face layout whose outputs are long enough to tell sequences apart."""
    return save(tiny_model(seed=3), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def take_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes this processor one of BUILDS, whose kernels have not been asked for yet."""
    known = (kernels.cpu_kernels, compiled.library)

    def take(name: str) -> None:
        if name not in HERE:
            pytest.skip(f"this processor has no {name}")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: name == "AVX512")
        for found in known:
            found.cache_clear()

    yield take
    for found in known:
        found.cache_clear()


@pytest.fixture(params=BUILDS)
def processor(request: pytest.FixtureRequest, take_for: Callable[[str], None]) -> str:
    """Each of BUILDS."""
    name: str = request.param
    take_for(name)
    return name


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """More than there are cores for tests, too: who does what must not matter."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
