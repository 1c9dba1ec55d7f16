"""The choice of tokens: see `choice.c`. Does not know networks, nor who asked for what.

Shapes: S sequences, K beams, V columns of scores.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from app.engine.beam_search import BeamState
from app.engine.cpu_kernels.compiled import address, check_shape, library
from app.engine.slot_options import LOOK_AHEAD, WHEN_FULL, SlotOptions
from app.engine.top_candidates import BLOCK, Candidates


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of each row, in fp32; those in fp32 that lie densely are overwritten.

    Args:
        logits: [S, K, V], V a multiple of BLOCK.

    Returns:
        [S, K, V].
    """
    size, beams, columns = logits.shape
    check_shape("logits", logits, (size, beams, columns // BLOCK * BLOCK))
    scores = logits.float().contiguous()
    library().code.log_softmax(address(scores), size * beams, columns, torch.get_num_threads())
    return scores


def ban_ngrams(scores: Tensor, said: Tensor, lengths: Tensor, sizes: Tensor) -> None:
    """`completes_ngram` of what was said itself, and `ban`, in place.

    Args:
        scores: [S, K, V] fp32, dense.
        said: [S, K, W] int64, less than V; its last dimension dense.
        lengths: [S] int64, at most W.
        sizes: [S] int64, n of the n-grams; 0 leaves a sequence alone.
    """
    size, beams, columns = scores.shape
    check_shape("said", said, (size, beams, said.shape[2]))
    check_shape("lengths", lengths, (size,))
    check_shape("sizes", sizes, (size,))
    if said.dtype != torch.int64 or said.is_cuda or (said.stride(2) != 1 and said.shape[2] > 1):
        raise ValueError(f"said is {said.dtype}, strides {said.stride()}: not int64 whose last dimension is dense")
    library().code.ban_ngrams(
        address(scores),
        said.data_ptr(),
        address(lengths, torch.int64),
        address(sizes, torch.int64),
        size,
        beams,
        columns,
        said.stride(0),
        said.stride(1),
    )


def can_choose(scores: Tensor, ranked: Tensor | None = None) -> bool:
    """Whether `top_candidates` takes these scores, [S, K, V], for twice as many candidates as there are beams."""
    dense = scores.is_contiguous() and (ranked is None or ranked.is_contiguous())
    return dense and scores.shape[2] >= 2 * BLOCK


def top_candidates(
    scores: Tensor, beam_scores: Tensor, k: int, vocab_size: int, ranked: Tensor | None = None
) -> Candidates:
    """`app.engine.top_candidates`; of equal ones the first.

    Args:
        scores: [S, K, V] fp32, dense; V is a multiple of BLOCK.
        beam_scores: [S, K] fp32.
        k: at most as many as there are blocks of a sequence.
        vocab_size: columns from here on are no tokens.
        ranked: what is compared where that is not the scores; as they are.
    """
    size, beams, columns = scores.shape
    blocks = columns // BLOCK
    compared = scores if ranked is None else ranked
    check_shape("scores", scores, (size, beams, blocks * BLOCK))
    check_shape("ranked", compared, (size, beams, columns))
    check_shape("beam_scores", beam_scores, (size, beams))
    if not 0 < k <= beams * blocks or not 0 < vocab_size <= columns:
        raise ValueError(f"{k} candidates of {beams} x {blocks} blocks, {vocab_size} tokens of {columns}")
    maxima = torch.empty(size, beams, blocks, dtype=torch.float32)
    real = torch.empty(2, size, k, dtype=torch.float32)
    whole = torch.empty(2, size, k, dtype=torch.int64)
    library().code.top_candidates(
        address(scores),
        address(compared),
        address(beam_scores),
        address(maxima),
        address(real[0]),
        address(real[1]),
        address(whole[0], torch.int64),
        address(whole[1], torch.int64),
        size,
        beams,
        columns,
        k,
        vocab_size,
        torch.get_num_threads(),
    )
    return Candidates(scores=real[0], token_logprobs=real[1], rows=whole[0], tokens=whole[1])


class _Search(ctypes.Structure):
    """`search` of choice.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("live_seqs", "live_log_probs", "live_token_logprobs")),
        *((name, ctypes.c_void_p) for name in ("finished_seqs", "finished_scores", "finished_lengths")),
        *((name, ctypes.c_void_p) for name in ("finished_token_logprobs", "is_finished", "can_improve", "lengths")),
        *((name, ctypes.c_void_p) for name in ("is_running", "max_new_tokens", "early_stopping", "length_divisors")),
        *((name, ctypes.c_int64) for name in ("S", "K", "T", "apart", "divisors_apart", "eos")),
        *((name, ctypes.c_int64) for name in ("when_full", "look_ahead")),
    )


class _Candidates(ctypes.Structure):
    """`candidates` of choice.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("scores", "token_logprobs", "rows", "tokens"))


def keep(state: BeamState, candidates: Candidates, options: SlotOptions, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """`app.engine.beam_search.keep`; of equal ones the first.

    Args:
        state: the running slots, a view made by `window`; updated in place.
        candidates: [S, 2K], no beam or token out of range.
        options: of the same slots.
        eos_token_id: the end token.
    """
    size, beams, width = state.live_seqs.shape
    apart, whole, flag = state.live_seqs.stride(1), torch.int64, torch.bool
    divisors = options.length_divisors
    for name in ("live_seqs", "live_token_logprobs", "finished_seqs", "finished_token_logprobs"):
        check_shape(name, getattr(state, name), (size, beams, width))
    for name in ("live_log_probs", "finished_scores", "finished_lengths", "is_finished"):
        check_shape(name, getattr(state, name), (size, beams))
    for name in ("can_improve", "lengths", "is_running"):
        check_shape(name, getattr(state, name), (size,))
    for name in ("max_new_tokens", "early_stopping"):
        check_shape(name, getattr(options, name), (size,))
    check_shape("length_divisors", divisors, (size, max(divisors.shape[1], width)))
    for name in ("scores", "token_logprobs", "rows", "tokens"):
        check_shape(name, getattr(candidates, name), (size, 2 * beams))

    def of_beams(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        if tensor.stride() != (beams * apart, apart, 1) or tensor.dtype != dtype or tensor.is_cuda:
            raise ValueError(f"{tensor.dtype}, strides {tensor.stride()}: not {dtype} as a window of {apart} lies")
        return tensor.data_ptr()

    search = _Search(
        of_beams(state.live_seqs, whole),
        address(state.live_log_probs),
        of_beams(state.live_token_logprobs),
        of_beams(state.finished_seqs, whole),
        address(state.finished_scores),
        address(state.finished_lengths, whole),
        of_beams(state.finished_token_logprobs),
        address(state.is_finished, flag),
        address(state.can_improve, flag),
        address(state.lengths, whole),
        address(state.is_running, whole),
        address(options.max_new_tokens, whole),
        address(options.early_stopping, whole),
        address(divisors),
        size,
        beams,
        width,
        apart,
        divisors.shape[1],
        eos_token_id,
        WHEN_FULL,
        LOOK_AHEAD,
    )
    among = _Candidates(
        address(candidates.scores),
        address(candidates.token_logprobs),
        address(candidates.rows, whole),
        address(candidates.tokens, whole),
    )
    parents, done = torch.empty(size, beams, dtype=whole), torch.empty(size, dtype=flag)
    library().code.keep(
        ctypes.byref(search), ctypes.byref(among), address(parents, whole), address(done, flag), torch.get_num_threads()
    )
    return done, parents
