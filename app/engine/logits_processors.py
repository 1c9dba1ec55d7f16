"""What changes a row of scores before tokens are chosen: the penalties, bans and filters of `generate`, in its order.

Functions over scores [S, K, V] (changed in place), what was said so far [S, K, T], and options that are one value a
sequence, so requests with different options share a batch. A ban is written where it falls, not as a mask over the
vocabulary: the scores end in at least one column that is no token (see `models/decoder.py`), and what needs no ban is
sent there. Does not know beams' histories of scores, nor who chooses.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from app.engine.slot_options import NO_TOKEN, ActiveOptions, SlotOptions


def process(
    scores: Tensor,
    said: Tensor,
    lengths: Tensor,
    options: SlotOptions,
    active: ActiveOptions,
    eos_token_id: int,
    kernels: ModuleType | None = None,
) -> Tensor:
    """Apply every option that a running sequence asks for, in the order of transformers' `_get_logits_processor`.

    Args:
        scores: [S, K, V]; log-probabilities in beam search, logits otherwise. Overwritten.
        said: [S, K, T] token ids, start token first.
        lengths: [S], how many of the T are said.
        options: of the S sequences.
        active: which of them anybody uses.
        eos_token_id: the end token.
        kernels: of `step_kernels_for`.

    Returns:
        [S, K, V]: the processed scores.
    """
    said = said[:, :, : active.target]
    if active.repetition_penalty:
        penalise_repetition(scores, said, lengths, options.repetition_penalty)
    if active.largest_ngram and kernels is not None and scores.is_contiguous():
        kernels.ban_ngrams(scores, said, lengths, options.no_repeat_ngram_size)
    elif active.largest_ngram:
        ends = completes_ngram(said, lengths, said, lengths, options.no_repeat_ngram_size, active.largest_ngram)
        ban(scores, said, ends)
    if active.largest_encoder_ngram:
        source = options.source_ids[:, None, : active.source]
        sizes, largest = options.encoder_no_repeat_ngram_size, active.largest_encoder_ngram
        ends = completes_ngram(source, options.source_lengths, said, lengths, sizes, largest)
        ban(scores, source, ends)
    if active.bad_words:
        ends = completes_bad_word(options.bad_word_prefixes, options.bad_word_ends, said, lengths)
        ban(scores, options.bad_word_ends[:, None], ends)
    if active.min_new_tokens:
        scores[..., eos_token_id].masked_fill_((lengths - 1 < options.min_new_tokens)[:, None], -torch.inf)
    if active.forced_bos:
        scores = force(scores, options.forced_bos_token_id, lengths == 1)
    if active.forced_eos:
        scores = force(scores, options.forced_eos_token_id, lengths == options.max_new_tokens)
    if active.suppress_tokens:
        tokens = options.suppress_tokens[:, None]
        ban(scores, tokens, tokens != NO_TOKEN)
    if active.begin_suppress_tokens:
        tokens = options.begin_suppress_tokens[:, None]
        ban(scores, tokens, (tokens != NO_TOKEN) & (lengths == options.begin_length)[:, None, None])
    return scores


def penalise_repetition(scores: Tensor, said: Tensor, lengths: Tensor, penalty: Tensor) -> None:
    """Divide positive and multiply negative scores of tokens already said (Keskar et al. 2019, arXiv:1909.05858).

    Args:
        scores: [S, K, V].
        said: [S, K, T].
        lengths: [S].
        penalty: [S], 1 leaves a sequence alone.
    """
    # Positions not said yet repeat the first token, which is said: the same value is written twice.
    index = torch.where(_before(lengths, said.shape[-1])[:, None], said, said[:, :, :1])
    old = scores.gather(-1, index)
    penalty = penalty[:, None, None]
    scores.scatter_(-1, index, torch.where(old < 0, old * penalty, old / penalty))


def completes_ngram(
    text: Tensor, text_lengths: Tensor, said: Tensor, lengths: Tensor, ngram_size: Tensor, largest: int
) -> Tensor:
    """Where `text` has a token that follows the last n-1 tokens said: saying it again would repeat an n-gram of `text`.

    Paulus et al. 2017, arXiv:1705.04304, for what was said itself; the same against the source for
    `encoder_no_repeat_ngram_size`.

    Args:
        text: [S, K or 1, W] token ids.
        text_lengths: [S], how many of the W are there.
        said: [S, K, T].
        lengths: [S].
        ngram_size: [S], n; 0 leaves a sequence alone.
        largest: of `ngram_size`, known on the host.

    Returns:
        [S, K, W] bool.
    """
    size, beams, width = said.shape
    matches = (_before(text_lengths, text.shape[-1]) & (ngram_size > 0)[:, None])[:, None]
    matches = (matches & (lengths >= ngram_size - 1)[:, None, None]).expand(size, beams, -1)
    at = torch.arange(text.shape[-1], device=said.device)
    for back in range(1, min(largest, width + 1)):  # longer n-grams than what is said cannot repeat
        before = text[:, :, (at - back).clamp(min=0)]
        last = said.gather(-1, (lengths - back).clamp(min=0)[:, None, None].expand(size, beams, 1))
        same = (before == last) & (at >= back)
        matches = matches & (same | (back >= ngram_size)[:, None, None])
    return matches


def completes_bad_word(prefixes: Tensor, ends: Tensor, said: Tensor, lengths: Tensor) -> Tensor:
    """Which bad words [S, K, W] lack only their last token.

    Args:
        prefixes: [S, W, M - 1], all tokens of each word but the last, filled up at the front with NO_TOKEN.
        ends: [S, W], the last token of each word; NO_TOKEN where there is no word.
        said: [S, K, T].
        lengths: [S].
    """
    size, beams, _ = said.shape
    matches = (ends != NO_TOKEN)[:, None].expand(size, beams, -1)
    for back in range(1, prefixes.shape[-1] + 1):
        wanted = prefixes[:, None, :, -back]  # [S, 1, W]
        last = said.gather(-1, (lengths - back).clamp(min=0)[:, None, None].expand(size, beams, 1))
        same = (wanted == last) & (lengths >= back)[:, None, None]
        matches = matches & (same | (wanted == NO_TOKEN))
    return matches


def ban(scores: Tensor, tokens: Tensor, where: Tensor) -> None:
    """Forbid `tokens` [S, K or 1, W] where [S, K or 1, W] says so; the rest is written to the column of no token."""
    index = torch.where(where, tokens, scores.shape[-1] - 1)
    scores.scatter_(-1, index.expand(*scores.shape[:2], -1), -torch.inf)


def force(scores: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """[S, K, V] with score 0 for `tokens` [S] and -inf for all others, `where` [S] holds and there is a token."""
    where = where & (tokens != NO_TOKEN)
    forced = torch.full_like(scores, -torch.inf)
    forced.scatter_(-1, tokens.clamp(min=0)[:, None, None].expand(*scores.shape[:2], 1), 0.0)
    return torch.where(where[:, None, None], forced, scores)


def _before(lengths: Tensor, width: int) -> Tensor:
    """[S, T]: whether position t is below the sequence's length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
