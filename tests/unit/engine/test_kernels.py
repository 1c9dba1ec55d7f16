"""Kernels of ours are used where they work, and only there; that they do: test_triton_kernels.py."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.engine import kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    kernels._working.cache_clear()
    yield
    kernels._working.cache_clear()


def test_a_cpu_has_none() -> None:
    assert kernels.kernels_for(CPU) is None


def test_what_cannot_be_compiled_is_said_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def linear(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(linear=linear, takes=lambda *_: True))
    with caplog.at_level(logging.WARNING):
        assert kernels._working(CPU) is None
        assert kernels._working(CPU) is None
    assert [record.getMessage() for record in caplog.records] == [
        "a decode step is made of torch's operations alone: Failed to find C compiler"
    ]
