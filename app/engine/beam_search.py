"""Beam search as one struct of fixed-shape tensors and pure functions over it.

The algorithm is transformers 5's `_beam_search`, step for step, with one difference: each sequence has its own
position, options and end. An item's early-stop heuristic is its own and never turns back, so evicting the item when it
fails gives what transformers gives, which goes on computing until the whole batch ends. Greedy decoding is the case of
one beam, with its own update, as in `_sample`. Does not know networks, caches or requests.

Shapes: S running sequences, K beams, T = longest output + 1 (the start token), V vocabulary, 2K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from app.engine.config import GenerationParams
from app.engine.logits_processors import ban_early_end, ban_repeated_ngrams, penalise_repetition

# transformers' "never": far below any sum of log-probabilities, and finite in fp32 and bf16.
LOWEST = -1.0e9
# BeamState.early_stopping; 0 is False.
WHEN_FULL, LOOK_AHEAD = 1, 2


@dataclass
class BeamState:
    """Everything that decoding knows of C slots; running ones are the first S."""

    live_seqs: Tensor  # [C, K, T] int64, start token first
    live_log_probs: Tensor  # [C, K] fp32, sums over generated tokens
    finished_seqs: Tensor  # [C, K, T] int64
    finished_scores: Tensor  # [C, K] fp32, length penalty applied, best first
    finished_lengths: Tensor  # [C, K] int64, start token included
    is_finished: Tensor  # [C, K] bool: the hypothesis beside it ended, by its end token or by length
    can_improve: Tensor  # [C] bool: a running beam may still beat a finished one
    lengths: Tensor  # [C] int64, tokens of live_seqs in use, start token included
    max_new_tokens: Tensor  # [C] int64
    min_new_tokens: Tensor  # [C] int64
    length_divisors: Tensor  # [C, T] fp32: a hypothesis of n generated tokens has its score divided by entry n
    early_stopping: Tensor  # [C] int64: 0, WHEN_FULL or LOOK_AHEAD
    no_repeat_ngram_size: Tensor  # [C] int64
    repetition_penalty: Tensor  # [C] fp32

    @classmethod
    def empty(cls, capacity: int, num_beams: int, max_length: int, device: torch.device) -> BeamState:
        """C slots with nothing in them."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(capacity, *shape, dtype=dtype, device=device)

        return cls(
            live_seqs=zeros(num_beams, max_length),
            live_log_probs=zeros(num_beams, dtype=torch.float32),
            finished_seqs=zeros(num_beams, max_length),
            finished_scores=zeros(num_beams, dtype=torch.float32),
            finished_lengths=zeros(num_beams),
            is_finished=zeros(num_beams, dtype=torch.bool),
            can_improve=zeros(dtype=torch.bool),
            lengths=zeros(),
            max_new_tokens=zeros(),
            min_new_tokens=zeros(),
            length_divisors=zeros(max_length, dtype=torch.float32),
            early_stopping=zeros(),
            no_repeat_ngram_size=zeros(),
            repetition_penalty=zeros(dtype=torch.float32),
        )

    def first(self, size: int) -> BeamState:
        """A view of the first S slots; writing to its tensors writes here."""
        return BeamState(**{f.name: getattr(self, f.name)[:size] for f in fields(self)})

    def start(self, slot: int, params: GenerationParams, start_token_id: int) -> None:
        """Make a slot new. Every field is written, so that nothing of its last occupant is left."""
        self.live_seqs[slot] = 0
        self.live_seqs[slot, :, 0] = start_token_id
        # Only the first beam counts in the first step: all K hold the same start token.
        self.live_log_probs[slot] = LOWEST
        self.live_log_probs[slot, 0] = 0.0
        self.finished_seqs[slot] = 0
        self.finished_scores[slot] = LOWEST
        self.finished_lengths[slot] = 0
        self.is_finished[slot] = False
        self.can_improve[slot] = True
        self.lengths[slot] = 1
        self.max_new_tokens[slot] = params.max_new_tokens
        self.min_new_tokens[slot] = params.min_new_tokens
        # On the host, in double precision as transformers does it: not every device has fp64.
        divisors = [1.0, *(n**params.length_penalty for n in range(1, self.length_divisors.shape[1]))]
        self.length_divisors[slot] = torch.tensor(divisors, device=self.lengths.device)
        # With no reward for length, "never" asks what False asks.
        never = params.early_stopping == "never" and params.length_penalty > 0
        self.early_stopping[slot] = LOOK_AHEAD if never else int(params.early_stopping is True)
        self.no_repeat_ngram_size[slot] = params.no_repeat_ngram_size
        self.repetition_penalty[slot] = params.repetition_penalty

    def move(self, source: int, target: int) -> None:
        """Slot `source`'s content becomes slot `target`'s."""
        for f in fields(self):
            tensor = getattr(self, f.name)
            tensor[target] = tensor[source]

    def grown(self, capacity: int) -> BeamState:
        """A copy with room for `capacity` slots."""
        _, num_beams, max_length = self.live_seqs.shape
        new = BeamState.empty(capacity, num_beams, max_length, self.lengths.device)
        for f in fields(self):
            held = getattr(self, f.name)
            getattr(new, f.name)[: held.shape[0]] = held
        return new

    def newest_tokens(self) -> Tensor:
        """[S, K]: the last token of each live beam, which the decoder reads next."""
        return self.live_seqs.gather(2, (self.lengths - 1)[:, None, None].expand(*self.live_log_probs.shape, 1))[..., 0]


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


def process_scores(state: BeamState, scores: Tensor, eos_token_id: int, options: ActiveOptions) -> Tensor:
    """Apply every option that a running sequence asks for, in the order of `generate`."""
    width = options.longest
    said = state.live_seqs[:, :, :width]
    if options.repetition_penalty:
        scores = penalise_repetition(scores, said, state.lengths, state.repetition_penalty)
    if options.largest_ngram:
        scores = ban_repeated_ngrams(scores, said, state.lengths, state.no_repeat_ngram_size, options.largest_ngram)
    if options.min_new_tokens:
        scores = ban_early_end(scores, state.lengths, state.min_new_tokens, eos_token_id)
    return scores


@dataclass(frozen=True)
class ActiveOptions:
    """Which processors any running sequence needs, and the longest target: known on the host, so no device is asked."""

    longest: int
    repetition_penalty: bool
    largest_ngram: int
    min_new_tokens: bool


def advance_beams(state: BeamState, logits: Tensor, eos_token_id: int, options: ActiveOptions) -> StepResult:
    """One step of beam search for S sequences: choose, finish, keep; `state` is updated in place.

    Args:
        state: the running slots, a view made by `BeamState.first`.
        logits: [S, K, V] in fp32.
        eos_token_id: the end token.
        options: what is active.
    """
    size, beams, vocab = logits.shape
    log_probs = process_scores(state, logits.log_softmax(-1), eos_token_id, options)
    accumulated = log_probs + state.live_log_probs[:, :, None]  # [S, K, V]
    failed = accumulated.isnan().flatten(1).any(1)  # [S]

    # 2K candidates, so that K of them can go on even if each of the K beams would end.
    top_log_probs, top = accumulated.flatten(1).topk(2 * beams)  # [S, 2K]
    parents, tokens = top // vocab, top % vocab
    top_seqs = _take_beams(state.live_seqs, parents)  # [S, 2K, T]
    top_seqs.scatter_(2, state.lengths[:, None, None].expand(size, 2 * beams, 1), tokens[:, :, None])
    at_limit = state.lengths >= state.max_new_tokens  # [S]: this token is the last that the request allows
    ends = (tokens == eos_token_id) | at_limit[:, None]  # [S, 2K]

    # Finished set: only the K best candidates may enter; the rest are there as a reserve for the live set.
    enters = ends.clone()
    enters[:, beams:] = False
    # `lengths` is the number of generated tokens here: this one included, the start token not.
    penalised = top_log_probs / state.length_divisors.gather(1, state.lengths[:, None])
    closed = (state.is_finished.all(1) & (state.early_stopping == WHEN_FULL)) | ~state.can_improve  # [S]
    penalised = penalised + closed[:, None] * LOWEST + ~enters * LOWEST
    merged_scores = torch.cat([state.finished_scores, penalised], 1)  # [S, 3K]
    scores, best = merged_scores.topk(beams)
    lengths = (state.lengths + 1)[:, None].expand(size, 2 * beams)
    state.finished_seqs.copy_(_take_beams(torch.cat([state.finished_seqs, top_seqs], 1), best))
    state.finished_lengths.copy_(torch.cat([state.finished_lengths, lengths], 1).gather(1, best))
    state.is_finished.copy_(torch.cat([state.is_finished, enters], 1).gather(1, best))
    state.finished_scores.copy_(scores)

    # Live set: the K best candidates that did not end.
    live_log_probs, live = (top_log_probs + ends * LOWEST).topk(beams)  # [S, K]
    state.live_seqs.copy_(_take_beams(top_seqs, live))
    state.live_log_probs.copy_(live_log_probs)
    state.lengths += 1

    # Could the best live beam still win? "never" with a positive penalty asks at the greatest length it may reach.
    length = torch.where(state.early_stopping == LOOK_AHEAD, state.max_new_tokens, state.lengths - 1)
    best_live = state.live_log_probs[:, 0] / state.length_divisors.gather(1, length[:, None])[:, 0]
    worst_finished = torch.where(state.is_finished, state.finished_scores.min(1, keepdim=True)[0], LOWEST)  # [S, K]
    state.can_improve &= (best_live[:, None] > worst_finished).any(1)
    full = state.is_finished.all(1) & (state.early_stopping == WHEN_FULL)
    return StepResult(~state.can_improve | full | at_limit, failed, parents.gather(1, live))


def advance_greedy(state: BeamState, logits: Tensor, eos_token_id: int, options: ActiveOptions) -> StepResult:
    """One greedy step for S sequences of one beam; processors see logits here, as in transformers' `_sample`.

    The finished hypothesis grows in place; its score is the mean log-probability of its tokens after processors.
    """
    scores = process_scores(state, logits, eos_token_id, options)[:, 0]  # [S, V]
    failed = scores.isnan().any(1)
    tokens = scores.argmax(-1)  # [S]
    chosen = scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(-1)
    state.live_seqs.scatter_(2, state.lengths[:, None, None], tokens[:, None, None])
    state.live_log_probs += chosen[:, None]
    done = (tokens == eos_token_id) | (state.lengths >= state.max_new_tokens)
    state.finished_seqs.copy_(state.live_seqs)
    state.finished_scores.copy_(state.live_log_probs / state.lengths[:, None])
    state.lengths += 1
    state.finished_lengths.copy_(state.lengths[:, None])
    return StepResult(done, failed, None)


def _take_beams(tensor: Tensor, beams: Tensor) -> Tensor:
    """[S, B, T] and indices [S, K] into B -> [S, K, T]."""
    return tensor.gather(1, beams[:, :, None].expand(*beams.shape, tensor.shape[2]))
