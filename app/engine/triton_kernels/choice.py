"""Of the choice of tokens: log-probabilities, banned n-grams, the best candidates, and what becomes of the beams.

Shapes: S sequences, K beams, V columns of scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from app.engine.beam_search import LOWEST, BeamState
from app.engine.slot_options import LOOK_AHEAD, WHEN_FULL, SlotOptions
from app.engine.top_candidates import BLOCK, Candidates
from app.engine.triton_kernels.launch import begin, on, overlap

# Blocks of scores of a sequence's beams that one program can look through.
MAX_BLOCKS = 16384
# Below every score that is a number, and above what is taken already: entries of -inf are chosen once each, too.
_NOTHING = tl.constexpr(-3.0e38)
_LOWEST = tl.constexpr(LOWEST)
_WHEN_FULL, _LOOK_AHEAD = tl.constexpr(WHEN_FULL), tl.constexpr(LOOK_AHEAD)
_BLOCK = tl.constexpr(BLOCK)
# Scores that one program looks at: a row is several programs, or a few rows would leave a GPU idle.
CHUNK = 4096


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of each row, in fp32: [S, K, V].

    Args:
        logits: [S, K, V] in any dtype, its last dimension dense.
    """
    size, beams, columns = logits.shape
    chunks = triton.cdiv(columns, CHUNK)
    scores = logits.new_empty(size, beams, columns, dtype=torch.float32)
    parts = logits.new_empty(2, size * beams, chunks, dtype=torch.float32)
    strides, shape = logits.stride()[:2], {"K": beams, "V": columns, "CHUNK": CHUNK, "num_warps": 8}
    with on(logits):
        _sums[(size * beams, chunks)](logits, parts[0], parts[1], *strides, **shape, **overlap(logits))
        _log_softmax[(size * beams, chunks)](
            logits,
            parts[0],
            parts[1],
            scores,
            *strides,
            CHUNKS=chunks,
            PADDED=triton.next_power_of_2(chunks),
            **shape,
            **overlap(logits),
        )
    return scores


def ban_ngrams(scores: Tensor, said: Tensor, lengths: Tensor, sizes: Tensor) -> None:
    """`completes_ngram` of what was said itself, and `ban`, in place.

    Args:
        scores: [S, K, V], dense.
        said: [S, K, W] int64, its last dimension dense.
        lengths: [S] int64.
        sizes: [S] int64, n of the n-grams; 0 leaves a sequence alone.
    """
    size, beams, width = said.shape
    with on(scores):
        _ban_ngrams[(size, beams)](
            scores,
            said,
            lengths,
            sizes,
            scores.shape[-1],
            said.stride(0),
            said.stride(1),
            K=beams,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            **overlap(scores),
        )


def can_draw(scores: Tensor) -> bool:
    """Whether noise for these scores is made here: never, for there is no kernel of it."""
    return False


def can_choose(scores: Tensor, ranked: Tensor | None = None) -> bool:
    """Whether `top_candidates` takes these scores, [S, K, V], for twice as many candidates as there are beams."""
    blocks = scores.shape[2] // BLOCK  # of a beam
    return ranked is None and scores.is_contiguous() and 2 <= blocks <= MAX_BLOCKS // scores.shape[1]


def top_candidates(
    scores: Tensor, beam_scores: Tensor, k: int, vocab_size: int, ranked: Tensor | None = None
) -> Candidates:
    """`app.engine.top_candidates`.

    Args:
        scores: [S, K, V], dense; at most MAX_BLOCKS blocks of a sequence.
        beam_scores: [S, K], dense.
        k: at most as many as there are blocks.
        vocab_size: columns from here on are no tokens.
        ranked: None: noise is compared elsewhere.
    """
    assert can_choose(scores, ranked), "see `can_choose`"
    size, beams, columns = scores.shape
    maxima = scores.new_empty(size, beams, columns // BLOCK)
    real = scores.new_empty(2, size, k)
    whole = torch.empty(real.shape, dtype=torch.int64, device=real.device)
    blocks = beams * maxima.shape[2]
    padded = triton.next_power_of_2(blocks)
    with on(scores):
        _maxima[(triton.cdiv(maxima.numel(), CHUNK // BLOCK),)](
            scores, maxima, maxima.numel(), BLOCKS=CHUNK // BLOCK, **overlap(scores)
        )
        _top_candidates[(size,)](
            scores,
            maxima,
            beam_scores,
            real,
            whole,
            size * k,
            vocab_size,
            K=beams,
            V=columns,
            CHOSEN=k,
            PADDED_CHOSEN=triton.next_power_of_2(k),
            BLOCKS=blocks,
            PADDED_BLOCKS=padded,
            num_warps=8 if padded > 2048 else 4,
            **overlap(scores),
        )
    return Candidates(scores=real[0], token_logprobs=real[1], rows=whole[0], tokens=whole[1])


def keep(state: BeamState, candidates: Candidates, options: SlotOptions, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """The end of `advance_beams`: which candidates finish, which live on; `state`'s tensors are updated in place.

    Returns:
        [S] bool, whether the sequence's result is final; [S, K] int64, the beam that each live beam goes on from.
    """
    size, beams, width = state.live_seqs.shape
    parents = candidates.rows.new_empty(size, beams)
    done = torch.empty(size, dtype=torch.bool, device=parents.device)
    with on(parents):
        _keep[(size,)](
            candidates.scores,
            candidates.token_logprobs,
            candidates.rows,
            candidates.tokens,
            state.live_seqs,
            state.live_log_probs,
            state.live_token_logprobs,
            state.finished_seqs,
            state.finished_scores,
            state.finished_lengths,
            state.finished_token_logprobs,
            state.is_finished.view(torch.uint8),
            state.can_improve.view(torch.uint8),
            state.lengths,
            state.is_running,
            options.max_new_tokens,
            options.early_stopping,
            options.length_divisors,
            parents,
            done.view(torch.uint8),
            eos_token_id,
            width,
            state.live_seqs.stride(1),
            options.length_divisors.stride(0),
            K=beams,
            PADDED=triton.next_power_of_2(beams),
            PADDED_ALL=triton.next_power_of_2(3 * beams),
            TILE=64,
            **overlap(parents),
        )
    return done, parents


@triton.jit
def _sums(
    logits,
    highest,
    totals,
    sequence_stride,
    beam_stride,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one chunk of a row its greatest logit, and the sum of exponentials below it."""
    begin(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    from_row = logits + row // K * sequence_stride + row % K * beam_stride
    x = tl.load(from_row + v, mask=v < V, other=float("-inf")).to(tl.float32)
    most = tl.max(x, 0)
    base = tl.where(most == float("-inf"), 0.0, most)  # of a chunk without a token, whose sum is then 0
    at = row * tl.num_programs(1) + chunk
    tl.store(highest + at, most)
    tl.store(totals + at, tl.sum(tl.exp(x - base), 0))  # a maximum may pass over what is no number; a sum does not


@triton.jit
def _log_softmax(
    logits,
    highest,
    totals,
    scores,
    sequence_stride,
    beam_stride,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One chunk of a row, by what all its chunks sum up to."""
    begin(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, PADDED)
    parts = tl.load(highest + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
    most = tl.max(parts, 0)
    total = tl.sum(tl.load(totals + row * CHUNKS + c, mask=c < CHUNKS, other=0.0) * tl.exp(parts - most), 0)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    from_row = logits + row // K * sequence_stride + row % K * beam_stride
    x = tl.load(from_row + v, mask=v < V, other=0.0).to(tl.float32)
    tl.store(scores + row * V + v, x - most - tl.log(total), mask=v < V)


@triton.jit
def _maxima(scores, maxima, blocks, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    """Of so many blocks the greatest score of each; rows have numbers alone or none, so a block has, too."""
    begin(PDL)
    b, c = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, _BLOCK)
    inside = tl.load(scores + b[:, None] * _BLOCK + c[None, :], mask=(b < blocks)[:, None], other=float("-inf"))
    tl.store(maxima + b, tl.max(inside, 1), mask=b < blocks)


@triton.jit
def _ban_ngrams(
    scores,
    said,
    lengths,
    sizes,
    columns,
    sequence_stride,
    beam_stride,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One beam."""
    begin(PDL)
    sequence, beam = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, size = tl.load(lengths + sequence), tl.load(sizes + sequence)
    text = said + sequence * sequence_stride + beam * beam_stride
    t = tl.arange(0, BLOCK)
    matches = (t < length) & (t < WIDTH) & (size > 0) & (length >= size - 1)
    for back in range(1, tl.minimum(size, WIDTH + 1)):
        last = tl.load(text + tl.maximum(length - back, 0))
        before = tl.load(text + t - back, mask=matches & (t >= back), other=-1)
        matches = matches & (before == last)
    tokens = tl.load(text + t, mask=matches, other=0)
    tl.store(scores + (sequence * K + beam) * columns + tokens, float("-inf"), mask=matches)


@triton.jit
def _top_candidates(
    scores,
    maxima,
    beam_scores,
    real,
    whole,
    half,
    vocab_size,
    K: tl.constexpr,
    V: tl.constexpr,
    CHOSEN: tl.constexpr,
    PADDED_CHOSEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One sequence: the best blocks of all beams' scores one after the other, then the best sums in these."""
    begin(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    per_row: tl.constexpr = V // _BLOCK
    b = tl.arange(0, PADDED_BLOCKS)
    sums = tl.load(maxima + sequence * BLOCKS + b, mask=b < BLOCKS, other=0.0)
    sums += tl.load(beam_scores + sequence * K + b // per_row, mask=b < BLOCKS, other=0.0)
    sums = tl.where(sums > _NOTHING, sums, _NOTHING)  # what is no number, too
    sums = tl.where(b < BLOCKS, sums, float("-inf"))
    i = tl.arange(0, PADDED_CHOSEN)
    chosen = tl.zeros([PADDED_CHOSEN], tl.int32)
    for index in range(0, CHOSEN):
        best = tl.argmax(sums, 0)
        chosen = tl.where(i == index, best, chosen)
        sums = tl.where(b == best, float("-inf"), sums)

    c = tl.arange(0, _BLOCK)
    inside = tl.load(
        scores + (sequence * BLOCKS + chosen)[:, None] * _BLOCK + c[None, :],
        mask=(i < CHOSEN)[:, None] & (c >= 0)[None, :],
        other=0.0,
    )
    inside += tl.load(beam_scores + sequence * K + chosen // per_row)[:, None]
    inside = tl.where(inside > _NOTHING, inside, _NOTHING)
    inside = tl.where((i < CHOSEN)[:, None], inside, float("-inf"))
    flat = tl.reshape(inside, [PADDED_CHOSEN * _BLOCK])
    f = tl.arange(0, PADDED_CHOSEN * _BLOCK)
    found = tl.zeros([PADDED_CHOSEN], tl.int32)
    for index in range(0, CHOSEN):
        best = tl.argmax(flat, 0)
        block = tl.sum(tl.where(i == best // _BLOCK, chosen, 0), 0)
        found = tl.where(i == index, block * _BLOCK + best % _BLOCK, found)
        flat = tl.where(f == best, float("-inf"), flat)

    there = i < CHOSEN
    row = found // V
    token_logprob = tl.load(scores + sequence * (K * V) + found, mask=there, other=0.0)
    score = token_logprob + tl.load(beam_scores + sequence * K + row, mask=there, other=0.0)
    at = sequence * CHOSEN + i
    tl.store(real + at, score, mask=there)
    tl.store(real + half + at, token_logprob, mask=there)
    tl.store(whole + at, row.to(tl.int64), mask=there)
    tl.store(whole + half + at, tl.minimum(found % V, vocab_size - 1).to(tl.int64), mask=there)


@triton.jit
def _keep(
    scores,
    token_logprobs,
    rows,
    tokens,
    live_seqs,
    live_log_probs,
    live_token_logprobs,
    finished_seqs,
    finished_scores,
    finished_lengths,
    finished_token_logprobs,
    is_finished,
    can_improve,
    lengths,
    is_running,
    max_new_tokens,
    early_stopping,
    length_divisors,
    parents,
    done,
    eos_token_id,
    width,
    beam_stride,
    divisor_stride,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_ALL: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One sequence. All that is read of its state is read before any of it is written: threads share the work."""
    begin(PDL)
    s = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + s)
    running = tl.load(is_running + s)
    limit = tl.load(max_new_tokens + s)
    early = tl.load(early_stopping + s)
    improves = tl.load(can_improve + s) != 0
    divisor = tl.load(length_divisors + s * divisor_stride + length)
    at_limit = length >= limit
    k = tl.arange(0, PADDED)
    beams = k < K
    all_finished = tl.min(tl.load(is_finished + s * K + k, mask=beams, other=1).to(tl.int32), 0) != 0
    closed = (all_finished & (early == _WHEN_FULL)) | (improves == 0)

    # The K finished hypotheses, then the 2K candidates.
    j = tl.arange(0, PADDED_ALL)
    old, new = j < K, (j >= K) & (j < 3 * K)
    candidate = s * (2 * K) + j - K
    score = tl.load(scores + candidate, mask=new, other=0.0)
    says_end = tl.load(tokens + candidate, mask=new, other=0) == eos_token_id
    enters = new & (j < 2 * K) & (says_end | at_limit)
    penalised = score / divisor
    penalised = penalised + tl.where(closed, _LOWEST, 0.0)
    penalised = penalised + tl.where(enters, 0.0, _LOWEST)
    held = tl.load(finished_scores + s * K + j, mask=old, other=0.0)
    ranked = tl.where(old, held, penalised)
    live_score = score + tl.where(says_end, _LOWEST, 0.0)
    key = tl.where(old | new, tl.where(ranked > _NOTHING, ranked, _NOTHING), float("-inf"))
    live_key = tl.where(new, tl.where(live_score > _NOTHING, live_score, _NOTHING), float("-inf"))
    best = tl.zeros([PADDED], tl.int32)
    best_score = tl.zeros([PADDED], tl.float32)
    live = tl.zeros([PADDED], tl.int32) + K
    live_best = tl.zeros([PADDED], tl.float32)
    for index in range(0, K):
        which = tl.argmax(key, 0)
        best = tl.where(k == index, which, best)
        best_score = tl.where(k == index, tl.sum(tl.where(j == which, ranked, 0.0), 0), best_score)
        key = tl.where(j == which, float("-inf"), key)
        goes_on = tl.argmax(live_key, 0)
        live = tl.where(k == index, goes_on, live)
        live_best = tl.where(k == index, tl.sum(tl.where(j == goes_on, live_score, 0.0), 0), live_best)
        live_key = tl.where(j == goes_on, float("-inf"), live_key)

    # What each of the two sets is made of.
    was_finished = beams & (best < K)
    ends = beams & (best >= K)
    from_end, from_live = s * (2 * K) + best - K, s * (2 * K) + live - K
    end_token = tl.load(tokens + from_end, mask=ends, other=0)
    end_logprob = tl.load(token_logprobs + from_end, mask=ends, other=0.0)
    end_row = tl.load(rows + from_end, mask=ends, other=0)
    live_token = tl.load(tokens + from_live, mask=beams, other=0)
    live_logprob = tl.load(token_logprobs + from_live, mask=beams, other=0.0)
    live_row = tl.load(rows + from_live, mask=beams, other=0)
    old_length = tl.load(finished_lengths + s * K + best, mask=was_finished, other=0)
    new_length = tl.where(was_finished, old_length, length + 1)
    old_finished = tl.load(is_finished + s * K + best, mask=was_finished, other=0) != 0
    entered = ends & (best < 2 * K) & ((end_token == eos_token_id) | at_limit)
    finished = old_finished | entered
    tl.debug_barrier()

    slot = s * K * beam_stride
    to = slot + k * beam_stride
    end_from = slot + tl.where(was_finished, best, 0) * beam_stride
    end_live_from, live_from = slot + end_row * beam_stride, slot + live_row * beam_stride
    for first in range(0, width, TILE):
        t = first + tl.arange(0, TILE)
        inside = (t < width)[None, :]
        newest = (t == length)[None, :]
        read_old, read_end = inside & was_finished[:, None], inside & ends[:, None]
        written = inside & beams[:, None]
        a = tl.load(finished_seqs + end_from[:, None] + t[None, :], mask=read_old, other=0)
        b = tl.load(live_seqs + end_live_from[:, None] + t[None, :], mask=read_end, other=0)
        c = tl.load(live_seqs + live_from[:, None] + t[None, :], mask=written, other=0)
        d = tl.load(finished_token_logprobs + end_from[:, None] + t[None, :], mask=read_old, other=0.0)
        e = tl.load(live_token_logprobs + end_live_from[:, None] + t[None, :], mask=read_end, other=0.0)
        f = tl.load(live_token_logprobs + live_from[:, None] + t[None, :], mask=written, other=0.0)
        tl.debug_barrier()
        ended_seq = tl.where(was_finished[:, None], a, tl.where(newest, end_token[:, None], b))
        ended_logprob = tl.where(was_finished[:, None], d, tl.where(newest, end_logprob[:, None], e))
        target = to[:, None] + t[None, :]
        tl.store(finished_seqs + target, ended_seq, mask=written)
        tl.store(finished_token_logprobs + target, ended_logprob, mask=written)
        tl.store(live_seqs + target, tl.where(newest, live_token[:, None], c), mask=written)
        tl.store(live_token_logprobs + target, tl.where(newest, live_logprob[:, None], f), mask=written)
    tl.store(finished_scores + s * K + k, best_score, mask=beams)
    tl.store(finished_lengths + s * K + k, new_length, mask=beams)
    tl.store(is_finished + s * K + k, finished.to(tl.uint8), mask=beams)
    tl.store(live_log_probs + s * K + k, live_best, mask=beams)
    tl.store(parents + s * K + k, live_row, mask=beams)
    tl.store(lengths + s, length + running)

    # Could the best live beam still win?
    furthest = tl.where(early == _LOOK_AHEAD, limit, length)
    hope = tl.sum(tl.where(k == 0, live_best, 0.0), 0) / tl.load(length_divisors + s * divisor_stride + furthest)
    worst = tl.min(tl.where(beams, best_score, float("inf")), 0)
    to_beat = tl.where(finished, worst, _LOWEST)
    improves = improves & (tl.max((beams & (hope > to_beat)).to(tl.int32), 0) != 0)
    full = (tl.min((finished | (k >= K)).to(tl.int32), 0) != 0) & (early == _WHEN_FULL)
    tl.store(can_improve + s, improves.to(tl.uint8))
    tl.store(done + s, ((improves == 0) | full | at_limit).to(tl.uint8))
