"""Draws of tokens: what temperature, top-k and top-p leave of the scores, and of that the greatest with Gumbel noise.

The greatest is a draw from the softmax of the scores, and the k greatest are k draws without replacement, in order
(Kool et al. 2019, arXiv:1903.06059). Knows scores and who filters how; does not know beams, nor how noise is made
(`philox.py`).

Shapes: S sequences, K rows of each, V columns of scores.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.philox import gumbel_noise
from app.engine.slot_options import ActiveOptions, SlotOptions


def draw(
    scores: Tensor, steps: Tensor, options: SlotOptions, active: ActiveOptions, kernels: ModuleType | None = None
) -> tuple[Tensor, Tensor]:
    """A token of each row.

    Args:
        scores: [S, K, V] fp32.
        steps: [S], which draw of a sequence it is.
        options: of the S sequences.
        active: which of them anybody uses.
        kernels: of `step_kernels_for`.

    Returns:
        Tokens, [S, K]; their log-probabilities after the filters, [S, K].
    """
    if kernels is not None and kernels.can_draw(scores):
        floors = draw_floors(scores, options, active, 1, kernels)
        drawn: tuple[Tensor, Tensor] = kernels.draw(scores, options.temperature, floors, options.seed, steps)
        return drawn
    scores = warp(scores, options, active, min_tokens_to_keep=1)
    tokens = (scores + gumbel_noise(options.seed, steps, *scores.shape[1:])).argmax(-1)
    return tokens, scores.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def perturb(
    scores: Tensor, steps: Tensor, options: SlotOptions, active: ActiveOptions, kernels: ModuleType | None = None
) -> tuple[Tensor, Tensor]:
    """What the filters leave of scores, and that with noise: both [S, K, V]. `scores` may be overwritten.

    Two tokens of a row stay at least, so that one can go on where the other ends. The rest is as for `draw`.
    """
    if kernels is not None and kernels.can_draw(scores):
        floors = draw_floors(scores, options, active, 2, kernels)
        return scores, kernels.perturb(scores, options.temperature, floors, options.seed, steps)
    scores = warp(scores, options, active, min_tokens_to_keep=2)
    return scores, scores + gumbel_noise(options.seed, steps, *scores.shape[1:])


def warp(scores: Tensor, options: SlotOptions, active: ActiveOptions, min_tokens_to_keep: int) -> Tensor:
    """Temperature, top-k and top-p (Holtzman et al. 2019, arXiv:1904.09751), in that order.

    Args:
        scores: [S, K, V].
        options: of the S sequences; temperature 1, top_k 0 and top_p 1 leave a sequence as it is.
        active: which of them anybody uses.
        min_tokens_to_keep: tokens that no filter takes away; 2 with beams, so that one can go on.

    Returns:
        [S, K, V], -inf where a token may not be drawn.
    """
    floors = draw_floors(scores, options, active, min_tokens_to_keep)
    scores = scores / options.temperature[:, None, None]
    return scores.masked_fill(scores < floors[..., None], -torch.inf) if active.filter_width else scores


def draw_floors(
    scores: Tensor,
    options: SlotOptions,
    active: ActiveOptions,
    min_tokens_to_keep: int,
    kernels: ModuleType | None = None,
) -> Tensor:
    """The least score of each row, after temperature, that top-k and top-p leave to be drawn; -inf without a filter.

    Args:
        scores: [S, K, V], before temperature. The rest is as for `warp`.
        kernels: some that can draw from `scores`, on a CPU.

    Returns:
        [S, K].
    """
    floors = scores.new_full(scores.shape[:2], -torch.inf)
    if not active.filter_width:
        return floors
    temperature, top_k, top_p = (x[:, None, None] for x in (options.temperature, options.top_k, options.top_p))
    has_top_k, has_top_p = top_k > 0, top_p < 1.0  # [S, 1, 1]
    top_k = top_k.clamp(min=min_tokens_to_keep)
    if kernels is not None:
        if has_top_k.any():
            best = scores.topk(min(int(top_k.max()), scores.shape[-1])).values / temperature
            last = (top_k.clamp(max=best.shape[-1]) - 1).expand(*scores.shape[:2], 1)
            floors = torch.where(has_top_k, best.gather(-1, last), -torch.inf)[..., 0]
        if has_top_p.any():
            kernels.raise_floors(scores, options.temperature, options.top_p, floors, min_tokens_to_keep)
        return floors
    width = min(max(active.filter_width, min_tokens_to_keep), scores.shape[-1])
    # [S, K, width], descending: what nobody's top_k reaches is not sorted.
    best = scores.topk(width).values / temperature
    rank = torch.arange(width, device=scores.device)
    best = best.masked_fill(has_top_k & (rank >= top_k), -torch.inf)
    # What more tokens add comes last, so that a row's first sums are the same whatever the others' filters are.
    mass = (best - best[..., :1]).exp().cumsum(-1)
    before = F.pad(mass[..., :-1], (1, 0)) / mass[..., -1:]
    beyond_p = has_top_p & (before >= top_p) & (rank >= min_tokens_to_keep)
    worst = best.masked_fill(beyond_p | (best == -torch.inf), torch.inf).amin(-1)
    return torch.where((has_top_k | has_top_p)[..., 0], worst, -torch.inf)
