"""Draws of tokens: see `draws.c`. Does not know who asked for what, nor how floors come about.

Shapes: S sequences, K rows of each, V columns of scores, a multiple of BLOCK.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.engine.cpu_kernels.compiled import address, check_shape, library
from app.engine.top_candidates import BLOCK


def can_draw(scores: Tensor) -> bool:
    """Whether the functions here take these scores."""
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


def raise_floors(scores: Tensor, temperatures: Tensor, shares: Tensor, floors: Tensor, kept: int) -> None:
    """Raise each row's floor to the least score that top-p leaves of what is above it, in place.

    Args:
        scores: [S, K, V] fp32, dense.
        temperatures: [S] fp32.
        shares: [S] fp32, top-p; 1 leaves a sequence alone.
        floors: [S, K] fp32, after temperature.
        kept: tokens that stay at least, 1 or 2.
    """
    size, rows, columns = scores.shape
    check_shape("scores", scores, (size, rows, columns // BLOCK * BLOCK))
    check_shape("temperatures", temperatures, (size,))
    check_shape("shares", shares, (size,))
    check_shape("floors", floors, (size, rows))
    if kept not in (1, 2):
        raise ValueError(f"{kept} tokens that stay; it is 1 or 2")
    threads = torch.get_num_threads()
    room = torch.empty(threads, columns)
    library().code.raise_floors(
        address(scores),
        address(temperatures),
        address(shares),
        address(floors),
        address(room),
        size,
        rows,
        columns,
        kept,
        threads,
    )


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
