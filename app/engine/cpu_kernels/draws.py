"""Draws of tokens: see `draws.c`. Does not know who asked for what, nor how floors come about.

Shapes: S sequences, K rows of each, V columns of scores, a multiple of BLOCK.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.engine.cpu_kernels.compiled import address, check_shape, library
from app.engine.top_candidates import BLOCK


def can_draw(scores: Tensor) -> bool:
    """Whether `draw` and `perturb` take these scores."""
    return scores.is_contiguous() and scores.dtype is torch.float32 and scores.shape[2] % BLOCK == 0


def draw(scores: Tensor, temperatures: Tensor, floors: Tensor, seeds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row, drawn from what temperature and floor leave of its scores; of equal ones the first.

    Args:
        scores: [S, K, V] fp32, dense.
        temperatures: [S] fp32.
        floors: [S, K] fp32: lower ones, after temperature, are not drawn.
        seeds: [S, 2] int64, low and high 32 bits.
        steps: [S] int64.

    Returns:
        Tokens, [S, K] int64; their log-probabilities, [S, K] fp32.
    """
    size, rows, _ = scores.shape
    tokens, logprobs = torch.empty(size, rows, dtype=torch.int64), torch.empty(size, rows)
    library().code.draw(
        address(scores),
        *_sources(scores, temperatures, floors, seeds, steps),
        address(tokens, torch.int64),
        address(logprobs),
        *scores.shape,
        torch.get_num_threads(),
    )
    return tokens, logprobs


def perturb(scores: Tensor, temperatures: Tensor, floors: Tensor, seeds: Tensor, steps: Tensor) -> Tensor:
    """Scores and Gumbel noise, [S, K, V]; `scores` become what temperature and floor leave of them.

    The rest is as for `draw`.
    """
    ranked = torch.empty_like(scores)
    library().code.perturb(
        address(scores),
        address(ranked),
        *_sources(scores, temperatures, floors, seeds, steps),
        *scores.shape,
        torch.get_num_threads(),
    )
    return ranked


def _sources(scores: Tensor, temperatures: Tensor, floors: Tensor, seeds: Tensor, steps: Tensor) -> tuple[int, ...]:
    size, rows, columns = scores.shape
    check_shape("scores", scores, (size, rows, columns // BLOCK * BLOCK))
    check_shape("temperatures", temperatures, (size,))
    check_shape("floors", floors, (size, rows))
    check_shape("seeds", seeds, (size, 2))
    check_shape("steps", steps, (size,))
    return (
        address(temperatures),
        address(floors),
        address(seeds, torch.int64),
        address(steps, torch.int64),
    )
