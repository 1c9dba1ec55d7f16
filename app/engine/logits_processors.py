"""What changes a row of scores before tokens are chosen: the penalties and bans of `generate`, in its order.

Pure functions over scores [S, K, V] and what was said so far [S, K, T]; options are one value a sequence, so requests
with different options share a batch. Does not know beams' histories of scores, nor who chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalise_repetition(scores: Tensor, said: Tensor, lengths: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of tokens already said (Keskar et al. 2019, arXiv:1909.05858).

    Args:
        scores: [S, K, V]; log-probabilities in beam search, logits in greedy decoding.
        said: [S, K, T] token ids, start token first.
        lengths: [S], how many of the T are said.
        penalty: [S], 1 leaves a sequence alone.
    """
    # Positions not said yet repeat the first token, which is said: the same value is written twice.
    index = torch.where(_before(lengths, said.shape[-1])[:, None], said, said[:, :, :1])
    old = scores.gather(-1, index)
    penalty = penalty[:, None, None]
    return scores.scatter(-1, index, torch.where(old < 0, old * penalty, old / penalty))


def ban_repeated_ngrams(scores: Tensor, said: Tensor, lengths: Tensor, ngram_size: Tensor, largest: int) -> Tensor:
    """Forbid tokens that would complete an n-gram said before (Paulus et al. 2017, arXiv:1705.04304).

    Args:
        scores: [S, K, V].
        said: [S, K, T].
        lengths: [S].
        ngram_size: [S], 0 leaves a sequence alone.
        largest: of `ngram_size`, known on the host.
    """
    size, beams, width = said.shape
    # A token at t is banned if the n-1 tokens before t equal the last n-1 tokens said.
    matches = _before(lengths, width)[:, None].expand(size, beams, width).clone()
    for back in range(1, min(largest, width + 1)):  # longer n-grams than what is said cannot repeat
        at = torch.arange(width, device=said.device) - back
        before = said[:, :, at.clamp(min=0)]
        last = said.gather(-1, (lengths - back).clamp(min=0)[:, None, None].expand(size, beams, 1))
        same = (before == last) & (at >= 0) & (lengths >= back)[:, None, None]
        matches &= same | (back >= ngram_size)[:, None, None]
    matches &= (ngram_size > 0)[:, None, None] & (lengths >= ngram_size)[:, None, None]
    # scatter_reduce rather than scatter: the same token may be banned at one place and not at another.
    bans = torch.zeros_like(scores).scatter_reduce(-1, said, matches.to(scores.dtype), "amax")
    return scores.masked_fill(bans > 0, -torch.inf)


def ban_early_end(scores: Tensor, lengths: Tensor, min_new_tokens: Tensor, eos_token_id: int) -> Tensor:
    """Forbid the end token until `min_new_tokens` [S] tokens are said; `lengths` [S] counts the start token."""
    scores = scores.clone()
    scores[..., eos_token_id].masked_fill_((lengths - 1 < min_new_tokens)[:, None], -torch.inf)
    return scores


def _before(lengths: Tensor, width: int) -> Tensor:
    """[S, T]: whether position t is below the sequence's length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
