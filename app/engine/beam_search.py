"""Beam search as one struct of fixed-shape tensors and pure functions over it.

The algorithm is transformers 5's `_beam_search`, step for step, with one difference: each sequence has its own
position, options and end. An item's early-stop heuristic is its own and never turns back, so evicting the item when it
fails gives what transformers gives, which goes on computing until the whole batch ends. Greedy decoding and sampling
are rows without competition, with an update of their own, as in `_sample`. Diverse beam search is one beam search a
group, in turn. Does not know networks, caches or requests.

Shapes: S running sequences, K beams (rows), T = longest output + 1 (the start token), V columns of scores (the
vocabulary, and at least one more), 2K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from app.engine.logits_processors import process
from app.engine.sampling import draw, perturb
from app.engine.slot_options import LOOK_AHEAD, WHEN_FULL, ActiveOptions, SlotOptions, Vocabulary
from app.engine.slot_tensors import SlotTensors
from app.engine.top_candidates import Candidates, top_candidates

# transformers' "never": far below any sum of log-probabilities, and finite.
LOWEST = -1.0e9


@dataclass
class BeamState(SlotTensors):
    """Everything that a search knows of C slots; running ones are the first S."""

    live_seqs: Tensor  # [C, K, T] int64, start token first
    live_log_probs: Tensor  # [C, K] fp32, sums over generated tokens
    live_token_logprobs: Tensor  # [C, K, T] fp32, of each token, after processors; 0 for the start token
    finished_seqs: Tensor  # [C, K, T] int64
    finished_scores: Tensor  # [C, K] fp32, length penalty applied, best first
    finished_lengths: Tensor  # [C, K] int64, start token included
    finished_token_logprobs: Tensor  # [C, K, T] fp32
    is_finished: Tensor  # [C, K] bool: the hypothesis beside it ended, by its end token or by length
    can_improve: Tensor  # [C] bool: a running beam may still beat a finished one
    lengths: Tensor  # [C] int64, tokens of live_seqs in use, start token included
    is_running: Tensor  # [C] int64: 1 where a sequence is, 0 where a step computes a free slot along

    @classmethod
    def empty(cls, capacity: int, num_beams: int, max_length: int, device: torch.device) -> BeamState:
        """C free slots."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(capacity, *shape, dtype=dtype, device=device)

        return cls(
            live_seqs=zeros(num_beams, max_length),
            live_log_probs=zeros(num_beams, dtype=torch.float32),
            live_token_logprobs=zeros(num_beams, max_length, dtype=torch.float32),
            finished_seqs=zeros(num_beams, max_length),
            finished_scores=zeros(num_beams, dtype=torch.float32),
            finished_lengths=zeros(num_beams),
            finished_token_logprobs=zeros(num_beams, max_length, dtype=torch.float32),
            is_finished=zeros(num_beams, dtype=torch.bool),
            can_improve=zeros(dtype=torch.bool),
            lengths=zeros() + 1,
            is_running=zeros(),
        )

    def start(self, slots: slice, start_token_id: int) -> None:
        """Make slots new. Every field is written, so that nothing of their last occupants is left."""
        self.live_seqs[slots] = 0
        self.live_seqs[slots, :, 0] = start_token_id
        # Only the first beam counts in the first step: all K hold the same start token.
        self.live_log_probs[slots] = LOWEST
        self.live_log_probs[slots, 0] = 0.0
        self.live_token_logprobs[slots] = 0.0
        self.finished_seqs[slots] = 0
        self.finished_scores[slots] = LOWEST
        self.finished_lengths[slots] = 0
        self.finished_token_logprobs[slots] = 0.0
        self.is_finished[slots] = False
        self.can_improve[slots] = True
        self.lengths[slots] = 1
        self.is_running[slots] = 1

    def window(self, size: int, width: int) -> BeamState:
        """A view of the first `size` slots and the first `width` positions of every sequence."""
        view = self.first(size)
        for name in ("live_seqs", "live_token_logprobs", "finished_seqs", "finished_token_logprobs"):
            setattr(view, name, getattr(view, name)[:, :, :width])
        return view

    def free(self, slot: int) -> None:
        """Leave a slot such that steps that still compute it write nothing out of range."""
        self.lengths[slot] = 1
        self.is_running[slot] = 0

    def newest_tokens(self) -> Tensor:
        """[S, K]: the last token of each row, which the decoder reads next."""
        return self.live_seqs.gather(2, _at(self.lengths - 1, self.live_log_probs.shape[1]))[..., 0]


@dataclass(frozen=True)
class StepResult:
    """What one step says to the host.

    Attributes:
        done: [S] bool, the sequence's result is final.
        failed: [S] bool, the sequence's scores were not numbers.
        parents: [S, K] int64, the beam that each live beam goes on from; None when no beam moved.
    """

    done: Tensor
    failed: Tensor
    parents: Tensor | None


def advance_beams(
    state: BeamState,
    logits: Tensor,
    options: SlotOptions,
    active: ActiveOptions,
    vocabulary: Vocabulary,
    taken: Tensor | None = None,
    kernels: ModuleType | None = None,
) -> StepResult:
    """One step of beam search for S sequences: choose, finish, keep; `state` is updated in place.

    Args:
        state: the running slots, a view made by `window`.
        logits: [S, K, V]; those in fp32 may be overwritten.
        options: of the same slots.
        active: what is in use.
        vocabulary: of the checkpoint.
        taken: [S, n], the tokens that earlier groups' beams have just said; diverse beam search only.
        kernels: of `step_kernels_for`.
    """
    size, beams, _ = logits.shape
    if kernels is not None:
        scores = kernels.log_softmax(logits)
    else:
        logits = logits.float()
        # Each row is read before it is written. Not a group's of several sequences: CUDA would write them as if they
        # lay together.
        scores = torch.log_softmax(logits, -1, out=logits if logits.is_contiguous() else None)
    failed = scores[..., 0].isnan().any(1)  # one score that is no number makes its whole row so
    scores = process(scores, state.live_seqs, state.lengths, options, active, vocabulary.eos_token_id, kernels)
    ranked = None
    if active.do_sample:
        scores, ranked = perturb(scores, state.lengths, options, active, kernels)
    if taken is not None:
        penalty = -options.diversity_penalty[:, None, None].expand(size, beams, taken.shape[1])
        scores.scatter_add_(-1, taken[:, None].expand_as(penalty), penalty)

    # 2K candidates, so that K of them can go on even if each of the K beams would end.
    best = kernels.top_candidates if kernels is not None and kernels.can_choose(scores, ranked) else top_candidates
    candidates = best(scores, state.live_log_probs, 2 * beams, vocabulary.size, ranked)
    choose = keep if kernels is None else kernels.keep
    done, parents = choose(state, candidates, options, vocabulary.eos_token_id)
    return StepResult(done, failed, parents)


def keep(state: BeamState, candidates: Candidates, options: SlotOptions, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """Which candidates enter the finished set, and which live on; `state` is updated in place.

    Returns:
        [S] bool, whether the sequence's result is final; [S, K] int64, the beam that each live beam goes on from.
    """
    size, beams = state.live_log_probs.shape
    parents, tokens, top_log_probs = candidates.rows, candidates.tokens, candidates.scores  # each [S, 2K]
    at_newest = _at(state.lengths, 2 * beams)
    top_seqs = _take(state.live_seqs, parents).scatter_(2, at_newest, tokens[..., None])  # [S, 2K, T]
    top_token_logprobs = _take(state.live_token_logprobs, parents)
    top_token_logprobs.scatter_(2, at_newest, candidates.token_logprobs[..., None])
    at_limit = state.lengths >= options.max_new_tokens  # [S]: this token is the last that the request allows
    says_end = tokens == eos_token_id
    ends = says_end | at_limit[:, None]  # [S, 2K]

    # Finished set: only the K best candidates may enter; the rest are there as a reserve for the live set.
    enters = ends.clone()
    enters[:, beams:] = False
    generated = state.lengths.clone()  # [S]: this step's token included, the start token not
    penalised = top_log_probs / options.length_divisors.gather(1, generated[:, None])
    closed = (state.is_finished.all(1) & (options.early_stopping == WHEN_FULL)) | ~state.can_improve  # [S]
    penalised = penalised + closed[:, None] * LOWEST + ~enters * LOWEST
    finished_scores, best = torch.cat([state.finished_scores, penalised], 1).topk(beams)  # [S, K] of [S, 3K]
    lengths = (generated + 1)[:, None].expand(size, 2 * beams)
    state.finished_scores.copy_(finished_scores)
    state.finished_seqs.copy_(_take(torch.cat([state.finished_seqs, top_seqs], 1), best))
    state.finished_token_logprobs.copy_(_take(torch.cat([state.finished_token_logprobs, top_token_logprobs], 1), best))
    state.finished_lengths.copy_(torch.cat([state.finished_lengths, lengths], 1).gather(1, best))
    state.is_finished.copy_(torch.cat([state.is_finished, enters], 1).gather(1, best))

    # Live set: the K best candidates that did not say the end token (at the limit, later groups still look at them).
    live_log_probs, live = (top_log_probs + says_end * LOWEST).topk(beams)  # [S, K]
    state.live_log_probs.copy_(live_log_probs)
    state.live_seqs.copy_(_take(top_seqs, live))
    state.live_token_logprobs.copy_(_take(top_token_logprobs, live))
    state.lengths += state.is_running

    # Could the best live beam still win? "never" with a positive penalty asks at the greatest length it may reach.
    length = torch.where(options.early_stopping == LOOK_AHEAD, options.max_new_tokens, generated)
    best_live = state.live_log_probs[:, 0] / options.length_divisors.gather(1, length[:, None])[:, 0]
    worst_finished = torch.where(state.is_finished, state.finished_scores.min(1, keepdim=True)[0], LOWEST)  # [S, K]
    state.can_improve &= (best_live[:, None] > worst_finished).any(1)
    full = state.is_finished.all(1) & (options.early_stopping == WHEN_FULL)
    return ~state.can_improve | full | at_limit, parents.gather(1, live)


def advance_groups(
    groups: ListLike[BeamState],
    logits: Tensor,
    options: SlotOptions,
    active: ActiveOptions,
    vocabulary: Vocabulary,
    kernels: ModuleType | None = None,
) -> StepResult:
    """One step of diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424, with Hamming diversity).

    Each group is a beam search of K / G beams; a token loses `diversity_penalty` for each live beam of an earlier group
    that has just said it. A group whose result is final goes on, and counts, until all are final.

    Args:
        groups: the G states of the same S slots.
        logits: [S, K, V]; the beams of a group stand together.
    """
    width = logits.shape[1] // len(groups)
    results: list[StepResult] = []
    for state, scores in zip(groups, torch.split(logits, width, 1), strict=True):
        taken = torch.cat([earlier.newest_tokens() for earlier in groups[: len(results)]], 1) if results else None
        results.append(advance_beams(state, scores, options, active, vocabulary, taken, kernels))
    parents = [_needed(result.parents) + width * group for group, result in enumerate(results)]
    return StepResult(
        done=torch.stack([r.done for r in results]).all(0),
        failed=torch.stack([r.failed for r in results]).any(0),
        parents=torch.cat(parents, 1),
    )


def advance_rows(
    state: BeamState,
    logits: Tensor,
    options: SlotOptions,
    active: ActiveOptions,
    vocabulary: Vocabulary,
    kernels: ModuleType | None = None,
) -> StepResult:
    """One step of greedy decoding or sampling: the K rows of a sequence go on alone; processors see logits here.

    A row is copied to the finished set until it ends; its score is the mean log-probability of its tokens.
    """
    rows = logits.shape[1]
    # NaN or infinity anywhere is the greatest; asked before processors, where a forced token would hide it.
    failed = ~logits.amax(-1).isfinite().all(1)
    scores = process(logits.float(), state.live_seqs, state.lengths, options, active, vocabulary.eos_token_id, kernels)
    if active.do_sample:
        tokens, chosen = draw(scores, state.lengths, options, active, kernels)  # [S, K]
    else:
        tokens = scores.argmax(-1)
        # Not by kernels: a GPU's take a part of a row in which everything is forbidden for no numbers.
        chosen = scores.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    at_newest = _at(state.lengths, rows)
    state.live_seqs.scatter_(2, at_newest, tokens[..., None])
    state.live_token_logprobs.scatter_(2, at_newest, chosen[..., None])
    # The first token starts each row's sum: what `start` wrote is for beams.
    state.live_log_probs.copy_(torch.where((state.lengths == 1)[:, None], 0.0, state.live_log_probs) + chosen)
    at_limit = state.lengths >= options.max_new_tokens  # [S]

    goes_on = ~state.is_finished  # [S, K]: rows that had not ended before this step
    keep = goes_on[..., None]
    state.finished_seqs.copy_(torch.where(keep, state.live_seqs, state.finished_seqs))
    state.finished_token_logprobs.copy_(torch.where(keep, state.live_token_logprobs, state.finished_token_logprobs))
    mean = state.live_log_probs / state.lengths[:, None]
    state.finished_scores.copy_(torch.where(goes_on, mean, state.finished_scores))
    state.finished_lengths.copy_(torch.where(goes_on, state.lengths[:, None] + 1, state.finished_lengths))
    state.is_finished |= (tokens == vocabulary.eos_token_id) | at_limit[:, None]
    state.lengths += state.is_running
    return StepResult(state.is_finished.all(1), failed, None)


def _needed(parents: Tensor | None) -> Tensor:
    assert parents is not None, "beams have parents"
    return parents


def _at(positions: Tensor, rows: int) -> Tensor:
    """[S] -> [S, rows, 1], an index into the last dimension of [S, rows, T]."""
    return positions[:, None, None].expand(-1, rows, 1)


def _take(tensor: Tensor, beams: Tensor) -> Tensor:
    """[S, B, T] and indices [S, K] into B -> [S, K, T]."""
    return tensor.gather(1, beams[:, :, None].expand(*beams.shape, tensor.shape[2]))
