"""The memory of the caches. What they hold is compared with transformers in test_encoder_decoder.py and others."""

from __future__ import annotations

import psutil
import pytest
import torch

from app.engine.kv_cache import reserve

CPU = torch.device("cpu")
MIB = 2**20


def resident() -> int:
    memory: int = psutil.Process().memory_info().rss
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reserved_memory_is_zero_and_can_be_written(dtype: torch.dtype) -> None:
    held = reserve((3, 5, 7), CPU, dtype)
    assert held.dtype is dtype
    assert torch.equal(held, torch.zeros(3, 5, 7, dtype=dtype))
    held[1] = 2
    assert held.sum() == 2 * 5 * 7


def test_reserved_memory_is_taken_where_it_is_written_and_given_back_as_a_whole() -> None:
    before = resident()
    held = reserve((64, MIB), CPU, torch.float32)  # 256 MiB
    assert resident() - before < 8 * MIB
    held[:16] = 1
    assert 56 * MIB < resident() - before < 80 * MIB
    del held
    assert resident() - before < 8 * MIB
