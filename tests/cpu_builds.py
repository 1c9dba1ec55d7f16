"""Kernels for a CPU in tests: of which processors they can run here, and what their tests compare with."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from app.engine.cpu_kernels import compiled

_CAPABILITY, _VNNI = torch.backends.cpu.get_cpu_capability(), torch.cpu._is_vnni_supported()
# Of a processor, and what it runs; which of them this one can be taken for.
BUILDS = {"AVX2": "_avx2", "AVX512": "_avx512"}
HERE = [
    *(["AVX2"] if _CAPABILITY in ("AVX2", "AVX512") else []),
    *(["AVX512"] if _CAPABILITY == "AVX512" and _VNNI else []),
]

# Not where they give other answers: then tests are to fail.
needs_kernels = pytest.mark.skipif(
    not HERE or (shutil.which("gcc") is None and find_spec("app.engine.cpu_kernels._avx2") is None),
    reason="they are for x86 with AVX2, and gcc compiles them when the package is installed",
)


def lanes() -> int:
    """Numbers of fp32 in a vector of the kernels that are asked now; a head has a multiple of it."""
    return compiled.library().lanes


def wide() -> int:
    """Outputs of a panel of theirs."""
    return compiled.library().wide


def randoms(*shape: int, seed: int) -> Tensor:
    """Normal numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """As close as fp32 comes."""
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=5e-6, rtol=5e-6)
