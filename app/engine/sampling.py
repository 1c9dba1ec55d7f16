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
from app.engine.slot_options import WHOLE_VOCABULARY, ActiveOptions, SlotOptions
from app.engine.top_candidates import BLOCK

# Of the best tokens, which are looked at first where top-p may ask for any number of them.
FIRST_LOOK = 1024


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
        floors = draw_floors(scores, options, active, min_tokens_to_keep=1)
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
        floors = draw_floors(scores, options, active, min_tokens_to_keep=2)
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


def draw_floors(scores: Tensor, options: SlotOptions, active: ActiveOptions, min_tokens_to_keep: int) -> Tensor:
    """The least score of each row, after temperature, that top-k and top-p leave to be drawn; -inf without a filter.

    Args:
        scores: [S, K, V], before temperature. The rest is as for `warp`.

    Returns:
        [S, K].
    """
    if not active.filter_width:
        return scores.new_full(scores.shape[:2], -torch.inf)
    temperature, top_k, top_p = (x[:, None, None] for x in (options.temperature, options.top_k, options.top_p))
    has_top_k, has_top_p = top_k > 0, top_p < 1.0  # [S, 1, 1]
    width = min(max(active.filter_width, min_tokens_to_keep), scores.shape[-1])
    greatest = scores.amax(-1, keepdim=True) / temperature  # [S, K, 1]
    # Of a row that only top-p filters, any number may stay, and all count.
    total = _row_sums((scores / temperature - greatest).exp()) if active.filter_width == WHOLE_VOCABULARY else None

    def among(width: int) -> tuple[Tensor, Tensor]:
        """Of the best `width`: the worst that stays, and whether no further one could."""
        best = scores.topk(width).values / temperature  # [S, K, width], descending: the rest is not sorted
        rank = torch.arange(width, device=scores.device)
        best = best.masked_fill(has_top_k & (rank >= top_k.clamp(min=min_tokens_to_keep)), -torch.inf)
        # Added up one after the other: of more tokens the first sums are the same.
        sums = (best - greatest).exp().cumsum(-1)
        mass = sums / (sums[..., -1:] if total is None else torch.where(has_top_k, sums[..., -1:], total))
        beyond_p = has_top_p & (F.pad(mass[..., :-1], (1, 0)) >= top_p) & (rank >= min_tokens_to_keep)
        worst = best.masked_fill(beyond_p | (best == -torch.inf), torch.inf).amin(-1)
        return worst, torch.where(has_top_k, top_k <= width, ~has_top_p | (mass[..., -1:] >= top_p))

    # A look at what was found is free on a CPU alone; elsewhere the host would wait for the device.
    if scores.device.type == "cpu" and width > FIRST_LOOK:
        worst, is_all = among(FIRST_LOOK)
        if not is_all.all():
            worst, _ = among(width)
    else:
        worst, _ = among(width)
    return torch.where((has_top_k | has_top_p)[..., 0], worst, -torch.inf)


def _row_sums(x: Tensor) -> Tensor:
    """[S, K, V] -> [S, K, 1], in an order that does not depend on S and K: of one long row torch adds parts."""
    size, rows, columns = x.shape
    return F.pad(x, (0, -columns % BLOCK)).view(size, rows, -1, BLOCK).sum(-1).sum(-1, keepdim=True)
