"""Attention of a source, and of a few queries on shared keys, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from app.engine.attention import Padding, attend, attend_source, attend_sources


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [None, 1, 3], ids=["no mask", "one mask for all queries", "a mask a query"])
@torch.inference_mode()
def test_equals_scaled_dot_product_attention(dtype: torch.dtype, tolerance: float, rows: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(4, n, 8, generator=generator).to(dtype) for n in (3, 11, 11))
    mask = None
    if rows is not None:
        hidden = torch.rand(4, rows, 11, generator=generator) < 0.4
        hidden[..., 0] = False  # each query sees something
        mask = torch.zeros(4, rows, 11, dtype=dtype).masked_fill_(hidden, -torch.inf)
    ours = attend(query, keys, values, mask).float()
    exact = None if mask is None else mask.float()
    expected = F.scaled_dot_product_attention(query.float(), keys.float(), values.float(), exact, scale=1.0)
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@torch.inference_mode()
def test_a_source_attends_as_scaled_dot_product_attention(dtype: torch.dtype, tolerance: float) -> None:
    qkv = torch.randn(11, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    queries, keys, values = qkv.float().permute(1, 2, 0, 3)
    expected = F.scaled_dot_product_attention(queries, keys, values, scale=1.0).transpose(0, 1).flatten(1)
    torch.testing.assert_close(attend_source(qkv).float(), expected, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_a_masked_key_and_its_value_are_not_seen() -> None:
    query, keys, values = torch.randn(2, 4, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.zeros(2, 1, 5)
    mask[:, :, 3:] = -torch.inf
    seen = attend(query, keys[:, :3], values[:, :3], None)
    torch.testing.assert_close(attend(query, keys, values, mask), seen)


@pytest.mark.parametrize("lengths", [[7], [5, 64, 1], [64, 64], [130, 3]])
@torch.inference_mode()
def test_sources_together_attend_as_one_after_the_other(lengths: list[int]) -> None:
    qkv = torch.randn(sum(lengths), 3, 4, 8, generator=torch.Generator().manual_seed(0))
    padding = Padding.of(lengths, qkv.device)
    torch.testing.assert_close(attend_sources(qkv, lengths, padding), attend_sources(qkv, lengths))


@torch.inference_mode()
def test_a_source_that_is_no_number_is_not_seen_by_the_one_beside_it() -> None:
    lengths = [5, 9]
    qkv = torch.randn(14, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    qkv[5:] = torch.nan
    attended = attend_sources(qkv, lengths, Padding.of(lengths, qkv.device))
    torch.testing.assert_close(attended[:5], attend_sources(qkv[:5], [5]))
    qkv[5:] = 1.0
    qkv[:5] = torch.nan
    attended = attend_sources(qkv, lengths, Padding.of(lengths, qkv.device))
    torch.testing.assert_close(attended[5:], attend_sources(qkv[5:], [9]))
