"""Kernels of ours are used where they work, and only there; that they do: test_triton_kernels.py."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from app.engine import kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    kernels._working.cache_clear()
    yield
    kernels._working.cache_clear()


def test_a_cpu_has_no_kernels_of_triton() -> None:
    assert kernels.kernels_for(CPU) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cpu_has_kernels_in_fp32_alone(dtype: torch.dtype) -> None:
    assert kernels.step_kernels_for(CPU, dtype) is None
    assert kernels.cpu_kernels_for(CPU, dtype) is None


@pytest.mark.parametrize("faster", [True, False])
def test_whether_bf16_is_faster_is_found_out_by_multiplying(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x: torch.Tensor, _: torch.Tensor) -> None:
        time.sleep(0.004 if (x.dtype is torch.bfloat16) != faster else 0.0)

    monkeypatch.setattr(kernels, "has_bfloat16", lambda: True)
    monkeypatch.setattr(F, "linear", multiply)
    assert kernels._bfloat16_is_faster.__wrapped__() is faster


def test_a_busy_moment_does_not_decide_whether_bf16_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of all products take ten times as long: were they fp32's, bf16 would look five times as fast."""
    calls = []

    def multiply(x: torch.Tensor, _: torch.Tensor) -> None:
        calls.append(x.dtype)
        own = 0.002 if x.dtype is torch.bfloat16 else 0.001
        time.sleep(10 * own if len(calls) <= kernels.ROUNDS else own)

    monkeypatch.setattr(kernels, "has_bfloat16", lambda: True)
    monkeypatch.setattr(F, "linear", multiply)
    assert kernels._bfloat16_is_faster.__wrapped__() is False
    assert calls == [torch.float32, torch.bfloat16] * kernels.ROUNDS


def test_what_is_emulated_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: False)
    monkeypatch.setattr(F, "linear", pytest.fail)
    assert kernels._bfloat16_is_faster.__wrapped__() is False


def test_a_steps_kernels_on_cuda_are_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, cuda = ModuleType("triton_kernels"), torch.device("cuda")
    monkeypatch.setattr(kernels, "_working", lambda device: triton)
    assert kernels.step_kernels_for(cuda, torch.bfloat16) is triton
    assert kernels.cpu_kernels_for(cuda, torch.float32) is None


def test_what_cannot_be_compiled_is_said_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cross_attention(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(cross_attention=cross_attention))
    with caplog.at_level(logging.WARNING):
        assert kernels._working(CPU) is None
        assert kernels._working(CPU) is None
    assert [record.getMessage() for record in caplog.records] == [
        "a decode step is made of torch's operations alone: Failed to find C compiler"
    ]
