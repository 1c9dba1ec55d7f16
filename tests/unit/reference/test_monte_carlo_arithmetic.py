"""Random rounding: no rounding is the model itself, fp32's is as far off as fp32 is, and a draw is its seed's."""

from __future__ import annotations

import pytest
import torch

from app.engine import GenerationParams
from tests.reference.monte_carlo_arithmetic import FP32_ROUNDING, RandomRounding, rounded_at_random
from tests.reference.scores import NextScores, next_scores
from tests.tiny import DECODERS, ENCODERS, START, TinyShape, random_sources, tiny_model

PARAMS = GenerationParams(num_beams=2)
PREFIXES = ((START,), (START, 7), (START, 7, 9))


def distance(one: NextScores, other: NextScores) -> float:
    return max(abs(a - b) for tokens in PREFIXES for a, b in zip(one(tokens), other(tokens), strict=True))


@pytest.mark.parametrize(("encoder", "decoder"), list(zip(ENCODERS, DECODERS, strict=True)))
def test_without_rounding_scores_are_the_models(encoder: str, decoder: str) -> None:
    model = tiny_model(3, dtype=torch.float64, shape=TinyShape(encoder=encoder, decoder=decoder))
    (source,) = random_sources(1, seed=3)
    exact = next_scores(model, source, PARAMS)
    assert distance(rounded_at_random(model, source, PARAMS, seed=0, rounding=0.0), exact) < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_as_far_off_as_fp32_is(seed: int) -> None:
    (source,) = random_sources(1, seed)
    model = tiny_model(seed, dtype=torch.float64)
    exact = next_scores(model, source, PARAMS)
    drawn = sorted(distance(rounded_at_random(model, source, PARAMS, seed=run), exact) for run in range(5))
    fp32 = distance(next_scores(tiny_model(seed), source, PARAMS), exact)
    assert drawn[2] / 3 < fp32 < drawn[2] * 3
    assert drawn[0] > 0


def test_a_sum_of_products_is_as_far_off_as_one_in_fp32_term_by_term() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(200, 300, generator=generator), torch.randn(300, 1, generator=generator)
    exact = left.double() @ right.double()
    in_fp32 = torch.zeros(200, 1)
    for term in range(300):
        in_fp32 = in_fp32 + left[:, term, None] * right[term]
    with RandomRounding(seed=0):
        drawn = left.double() @ right.double()
    spread, expected = (float((found - exact).square().mean().sqrt()) for found in (drawn, in_fp32.double()))
    assert 0.5 < spread / expected < 2


def test_what_computes_nothing_is_not_rounded() -> None:
    numbers = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with RandomRounding(seed=0):
        copies = (
            numbers.clone(),
            torch.cat([numbers, numbers])[:5],
            numbers[[0, 1, 2, 3, 4]],
            numbers.mT.contiguous().mT,
        )
        added = numbers + 0
    assert all(torch.equal(copy, numbers) for copy in copies)
    assert not torch.equal(added, numbers)


def test_a_draw_is_its_seeds() -> None:
    numbers = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws = []
    for seed in (0, 0, 1):
        with RandomRounding(seed):
            draws.append(numbers @ numbers)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.testing.assert_close(draws[0], draws[2], rtol=100 * FP32_ROUNDING, atol=100 * FP32_ROUNDING)
