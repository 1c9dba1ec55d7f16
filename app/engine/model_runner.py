"""Owns every tensor on the device: weights, caches, beam states. Moves sequences into slots, steps them, frees them.

Sequences of one kind of search and width decode as one batch: a greedy request does not pay for eight rows, and tensors
stay rectangular. Does not know queues, threads or callers.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from app.engine.attention import Padding
from app.engine.beam_search import LOWEST, BeamState, StepResult, advance_beams, advance_groups, advance_rows
from app.engine.buckets import Buckets, round_up
from app.engine.checkpoint import Checkpoint
from app.engine.config import EngineConfig, GenerationParams
from app.engine.cuda_graphs import step_runner
from app.engine.kernels import step_kernels_for
from app.engine.kv_cache import CacheShape, KVCache
from app.engine.sequence import Hypothesis, Sequence
from app.engine.slot_options import ActiveOptions, SlotOptions, Vocabulary

# Kinds of search that keep their memory while nobody uses it (on a CPU: what each has used); more exist while they run.
MAX_BATCHES = 6


class SearchKind(NamedTuple):
    """What sequences must have in common to share a batch."""

    rows: int
    groups: int
    competing: bool  # beams compete; the rows of greedy decoding and plain sampling do not
    sampling: bool

    @classmethod
    def of(cls, params: GenerationParams) -> SearchKind:
        """The kind of search that a request asks for."""
        return cls(params.rows, params.num_beam_groups, params.num_beams > 1, params.do_sample)


class ModelRunner:
    """The device side of the engine."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        max_output_tokens: int,
        buckets: Buckets | None = None,
    ) -> None:
        """`buckets`: None takes exact sizes on a CPU, compact where oneDNN reads 16 bits, a few fixed on CUDA."""
        self.checkpoint = checkpoint
        self.config = config
        self.max_output_tokens = max_output_tokens
        info = checkpoint.info
        kernels = step_kernels_for(checkpoint.model.device, checkpoint.model.dtype)
        if buckets is None and checkpoint.model.device.type == "cuda":
            buckets = Buckets.doubling(config.max_num_seqs, max_output_tokens, info.max_source_tokens)
        elif buckets is None and checkpoint.model.attention_dtype.itemsize == 2 and kernels is None:
            buckets = Buckets.multiples(max_output_tokens, info.max_source_tokens)
        self.buckets = buckets or Buckets()
        # On CUDA few large launches beat many small ones, on a CPU every copy of what is padding costs.
        self.sources_together = checkpoint.model.device.type == "cuda"
        self.batches: dict[SearchKind, DecodeBatch] = {}

    def cache_shape(self, rows: int) -> CacheShape:
        """The sizes of the caches of sequences with so many rows."""
        decoder = self.checkpoint.model.decoder.sizes
        return CacheShape(
            num_layers=decoder.num_hidden_layers,
            num_beams=rows,
            num_heads=decoder.num_attention_heads,
            head_size=decoder.head_size,
            max_source=self.checkpoint.info.max_source_tokens,
            max_target=self.max_output_tokens,
        )

    def cache_bytes(self, rows: int) -> int:
        """Device memory, in bytes, of the caches with every slot taken by sequences of so many rows."""
        return self.config.max_num_seqs * self.cache_shape(rows).bytes_per_slot(self.checkpoint.model.attention_dtype)

    @torch.inference_mode()
    def admit(self, sequences: list[Sequence]) -> None:
        """Encode sources together, and give each sequence a slot."""
        model = self.checkpoint.model
        lengths = [len(sequence.source_ids) for sequence in sequences]
        ids = torch.tensor([token for sequence in sequences for token in sequence.source_ids], device=model.device)
        cross_kv = model.encode(ids, lengths)  # layer by layer, when it is asked for
        rows = Padding.of(lengths, model.device).rows if self.sources_together else None
        ends = list(itertools.accumulate(lengths))
        members: dict[SearchKind, list[int]] = {}
        for index, sequence in enumerate(sequences):
            members.setdefault(SearchKind.of(sequence.params), []).append(index)
        places: list[tuple[KVCache, int, Tensor | list[slice]]] = []
        for kind, indices in members.items():
            batch = self._batch(kind)
            first = batch.add([sequences[i] for i in indices])
            sources = [slice(ends[i] - lengths[i], ends[i]) for i in indices]
            places.append((batch.cache, first, sources if rows is None else rows[indices]))
        try:
            for layer, kv in enumerate(cross_kv):
                for cache, first, own in places:
                    cache.write_cross(layer, first, kv, own)
        except Exception:
            for cache, first, own in places:
                for slot in range(first, first + len(own)):
                    cache.clear(slot)  # whoever comes next finds nothing of what was written
            raise

    @torch.inference_mode()
    def step(self) -> None:
        """One decode step of everything that runs; sequences that are done hold their result and lose their slot."""
        launched = [(batch, batch.launch()) for batch in self.batches.values() if batch.sequences]
        for batch, flags in launched:
            batch.retire(flags)
        self._drop_idle(MAX_BATCHES)

    @torch.inference_mode()
    def release(self, sequence: Sequence) -> None:
        """Free a sequence's slot, wherever it is."""
        batch = self.batches.get(SearchKind.of(sequence.params))
        if batch is not None and sequence in batch.sequences:
            batch.release(sequence)

    def reset(self) -> None:
        """Drop every slot and its memory: after a failed step nothing in them can be trusted."""
        self.batches.clear()

    def _batch(self, kind: SearchKind) -> DecodeBatch:
        """The batch of a kind of search; idle ones go where there are too many, or no memory for a new one."""
        batch = self.batches.pop(kind, None)
        if batch is None:
            self._drop_idle(MAX_BATCHES - 1)
            batch = self._new_batch(kind)
        self.batches[kind] = batch  # last in the dict: used last
        return batch

    def _new_batch(self, kind: SearchKind) -> DecodeBatch:
        try:
            return DecodeBatch(self, kind)
        except (torch.OutOfMemoryError, OSError):  # of a device; of the machine (`kv_cache.reserve`)
            if not self._drop_idle(0):
                raise
        return DecodeBatch(self, kind)  # here, where what the error held is gone, too

    def _drop_idle(self, most: int) -> int:
        """Drop idle batches, those first that were used longest ago, until at most so many batches are held.

        Returns:
            How many were dropped.
        """
        idle = [kind for kind, batch in self.batches.items() if not batch.sequences]
        dropped = idle[: max(0, len(self.batches) - most)]
        for kind in dropped:
            del self.batches[kind]
        return len(dropped)


class DecodeBatch:
    """The running sequences of one kind of search: slots 0..S-1 are theirs, in the order of `sequences`."""

    def __init__(self, runner: ModelRunner, kind: SearchKind) -> None:
        self.model = runner.checkpoint.model
        info = runner.checkpoint.info
        self.vocabulary = Vocabulary(info.vocab_size, info.start_token_id, info.eos_token_id)
        self.kind = kind
        self.buckets = runner.buckets
        self.kernels = step_kernels_for(self.model.device, torch.float32)  # of scores, whatever the rows are in
        self.step_runner = step_runner(self.model.device, runner.config.cuda_graphs and bool(self.buckets.slots))
        self.sequences: list[Sequence] = []
        self.lengths: list[int] = []  # tokens of each target, start token included: the device's `lengths`, known here
        # All slots at once: a recorded step reads fixed addresses, and on a CPU what nobody uses takes no memory.
        capacity, device = runner.config.max_num_seqs, self.model.device
        max_length = runner.max_output_tokens + 1  # the start token
        self.cache = KVCache(
            runner.cache_shape(kind.rows), capacity, device, self.model.attention_dtype, self.model.dtype
        )
        self.options = SlotOptions.empty(capacity, info.max_source_tokens, max_length, device)
        # One search a group of beams; one, but for diverse beam search.
        width = kind.rows // kind.groups
        self.groups = [BeamState.empty(capacity, width, max_length, device) for _ in range(kind.groups)]

    def add(self, sequences: list[Sequence]) -> int:
        """Start sequences in the next free slots, whose cross-attention is still to be written; returns the first."""
        first, last = len(self.sequences), len(self.sequences) + len(sequences)
        self._room(max(self.lengths, default=1), max(len(s.source_ids) for s in (*self.sequences, *sequences)))
        self.options.start([(s.source_ids, s.params) for s in sequences], first, self.vocabulary.eos_token_id)
        for state in self.groups:
            state.start(slice(first, last), self.vocabulary.start_token_id)
        self.sequences += sequences
        self.lengths += [1] * len(sequences)
        return first

    def launch(self) -> Tensor:
        """Decode one token for every row of every slot; returns done and failed, [2, S or more], without waiting."""
        size = round_up(len(self.sequences), self.buckets.slots)
        sources = [len(s.source_ids) for s in self.sequences]
        target, source = self._room(max(self.lengths), max(sources))
        active = ActiveOptions.of(
            [s.params for s in self.sequences],
            self.lengths,
            target=target,
            source=source,
            ragged=min(sources) < source or size > len(sources),
        )
        self.lengths = [length + 1 for length in self.lengths]
        return self.step_runner.run((size, active), partial(self._decode, size, active))

    def release(self, sequence: Sequence) -> None:
        """Free a slot; the last one moves into the hole, so that running slots stay contiguous."""
        slot, last = self.sequences.index(sequence), len(self.sequences) - 1
        if slot != last:
            self.cache.move(last, slot, self.lengths[last], len(self.sequences[last].source_ids))
            self.options.move(last, slot)
            for state in self.groups:
                state.move(last, slot)
            self.sequences[slot], self.lengths[slot] = self.sequences[last], self.lengths[last]
        self.options.free(last)
        for state in self.groups:
            state.free(last)
        self.sequences.pop()
        self.lengths.pop()

    def _room(self, target: int, source: int) -> tuple[int, int]:
        """The positions that a step reads where so many are in use; compact caches are laid out for them."""
        target, source = round_up(target, self.buckets.target), round_up(source, self.buckets.source)
        if self.buckets.compact:
            return self.cache.make_room(len(self.sequences), target, source)
        return target, source

    def _decode(self, size: int, active: ActiveOptions) -> Tensor:
        """What the device does alone in a step: network, processors, choice, caches; returns two flags a slot."""
        options = self.options.first(size)
        groups = [state.window(size, active.target + 1) for state in self.groups]
        positions = groups[0].lengths - 1
        cache = self.cache.begin_step(positions, options.source_lengths, active.target, active.source, active.ragged)
        newest = torch.cat([state.newest_tokens() for state in groups], 1)
        logits = self.model.decode(newest, positions, cache)
        result = self._advance(groups, logits, options, active)
        if result.parents is not None:
            self.cache.follow(result.parents, active.target)
        return torch.stack([result.done, result.failed])

    def _advance(
        self, groups: list[BeamState], logits: Tensor, options: SlotOptions, active: ActiveOptions
    ) -> StepResult:
        if len(groups) > 1:
            return advance_groups(groups, logits, options, active, self.vocabulary, self.kernels)
        if self.kind.competing:
            return advance_beams(groups[0], logits, options, active, self.vocabulary, kernels=self.kernels)
        return advance_rows(groups[0], logits, options, active, self.vocabulary, self.kernels)

    def retire(self, flags: Tensor) -> None:
        """Take out the sequences that are done or have failed."""
        # A step's only synchronisation with the device, where nothing ends: two flags a slot.
        done, failed = flags[:, : len(self.sequences)].tolist()
        for slot, sequence in enumerate(self.sequences):
            if sequence.streams and not (done[slot] or failed[slot]):
                sequence.certain_ids = self._certain_ids(slot)
        ended = [slot for slot in range(len(done)) if done[slot] or failed[slot]]
        hypotheses = self._hypotheses([slot for slot in ended if not failed[slot]])
        for slot in reversed(ended):  # from the back: a release moves only slots behind the one it frees
            sequence = self.sequences[slot]
            if failed[slot]:
                sequence.fail("the model's scores for this text are not numbers")
                self.cache.clear(slot)
            elif hypotheses[slot]:
                sequence.finish(tuple(hypotheses[slot]))
            else:
                sequence.fail("no hypothesis could be finished with these options")
            self.release(sequence)

    def _certain_ids(self, slot: int) -> tuple[int, ...]:
        """The tokens with which a running sequence's best hypothesis will begin.

        Rows that do not compete: the first row's, which is the first result. Beams: what all hypotheses share that can
        still win, which are the live ones and the best of the finished: no other of those can pass it any more.
        """
        length = self.lengths[slot]
        if not self.kind.competing:
            (state,) = self.groups
            seqs, said = state.finished_seqs[slot, 0], int(state.finished_lengths[slot, 0])
            return tuple(seqs[1:said].tolist())
        candidates = [row[1:length] for state in self.groups for row in state.live_seqs[slot].tolist()]
        ended = [
            (score, row[1:said])
            for state in self.groups
            for row, score, said, is_finished in zip(
                state.finished_seqs[slot].tolist(),
                state.finished_scores[slot].tolist(),
                state.finished_lengths[slot].tolist(),
                state.is_finished[slot].tolist(),
                strict=True,
            )
            if is_finished
        ]
        best = max((score for score, _ in ended), default=0.0)
        candidates += [tokens for score, tokens in ended if score >= best]
        shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*candidates, strict=False))
        return tuple(column[0] for column in shared)

    def _hypotheses(self, slots: list[int]) -> dict[int, list[Hypothesis]]:
        """What these slots' searches finished, best first; rows that do not compete stay in their order.

        Fewer than asked for where the options leave no more: `generate` fills up with outputs that were ruled out,
        whose sums of log-probabilities are LOWEST or less.
        """
        found: dict[int, list[Hypothesis]] = {slot: [] for slot in slots}
        if not slots:
            return found
        for state in self.groups:
            columns = (
                state.finished_seqs,
                state.finished_token_logprobs,
                state.finished_scores,
                state.finished_lengths,
                state.is_finished,
            )
            for slot, *of_slot in zip(slots, *(column[slots].tolist() for column in columns), strict=True):
                penalty = self.sequences[slot].params.length_penalty
                for ids, logprobs, score, length, is_finished in zip(*of_slot, strict=True):
                    divisor = (length - 1) ** penalty if self.kind.competing and is_finished else 1.0
                    if is_finished and score * divisor > LOWEST / 2:  # NaN is not
                        tokens, said = tuple(ids[1:length]), tuple(logprobs[1:length])
                        ended = ids[length - 1] == self.vocabulary.eos_token_id
                        found[slot].append(Hypothesis(tokens, said, score, "eos" if ended else "length"))
        for slot, hypotheses in found.items():
            if self.kind.competing:
                hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
            del hypotheses[self.sequences[slot].params.num_return_sequences :]
        return found
