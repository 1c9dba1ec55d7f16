"""Owns every tensor on the device: weights, caches, beam states. Moves sequences into slots, steps them, frees them.

Sequences with the same `num_beams` decode as one batch with slots of that width: a greedy request does not pay for
eight rows, and tensors stay rectangular. Does not know queues, threads or callers.
"""

from __future__ import annotations

import torch

from app.engine.beam_search import ActiveOptions, BeamState, StepResult, advance_beams, advance_greedy
from app.engine.checkpoint import Checkpoint
from app.engine.config import EngineConfig
from app.engine.kv_cache import KVCache
from app.engine.sequence import Hypothesis, Sequence


class ModelRunner:
    """The device side of the engine."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, max_output_tokens: int) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.max_output_tokens = max_output_tokens
        self.batches: dict[int, BeamBatch] = {}

    @torch.inference_mode()
    def admit(self, sequences: list[Sequence]) -> None:
        """Encode sources in one batch, padded to the longest, and give each sequence a slot."""
        model = self.checkpoint.model
        lengths = torch.tensor([len(s.source_ids) for s in sequences])
        ids = torch.full((len(sequences), int(lengths.max())), self.checkpoint.info.pad_token_id)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.source_ids)] = torch.tensor(sequence.source_ids)
        cross_kv = model.encode(ids.to(model.device), lengths.to(model.device))  # [L, 2, S, H, N, D]
        for row, sequence in enumerate(sequences):
            batch = self.batches.get(sequence.params.num_beams)
            if batch is None:
                batch = BeamBatch(self.checkpoint, self.config, sequence.params.num_beams, self.max_output_tokens)
                self.batches[sequence.params.num_beams] = batch
            batch.add(sequence, cross_kv[:, :, row, :, : len(sequence.source_ids)])

    @torch.inference_mode()
    def step(self) -> None:
        """One decode step of everything that runs; sequences that are done hold their result and lose their slot."""
        for batch in self.batches.values():
            if batch.sequences:
                batch.step()

    @torch.inference_mode()
    def release(self, sequence: Sequence) -> None:
        """Free a sequence's slot, wherever it is."""
        batch = self.batches.get(sequence.params.num_beams)
        if batch is not None and sequence in batch.sequences:
            batch.release(sequence)

    def reset(self) -> None:
        """Drop every slot and its memory: after a failed step nothing in them can be trusted."""
        self.batches.clear()


class BeamBatch:
    """The running sequences of one `num_beams`: slots 0..S-1 are theirs, in the order of `sequences`."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, num_beams: int, max_output_tokens: int) -> None:
        self.model = checkpoint.model
        self.info = checkpoint.info
        self.max_num_seqs = config.max_num_seqs
        self.sequences: list[Sequence] = []
        self.lengths: list[int] = []  # tokens of each target, start token included: the device's `lengths`, known here
        decoder = self.model.decoder
        self.state = BeamState.empty(0, num_beams, max_output_tokens + 1, self.model.device)
        self.source_lengths = torch.zeros(0, dtype=torch.int64, device=self.model.device)  # [C]
        self.cache = KVCache(
            decoder.num_hidden_layers,
            num_beams,
            decoder.num_attention_heads,
            decoder.head_size,
            self.info.max_source_tokens,
            max_output_tokens,
            self.model.device,
            self.model.dtype,
        )

    def add(self, sequence: Sequence, cross_kv: torch.Tensor) -> None:
        """Start a sequence in the next free slot; `cross_kv` is [L, 2, H, n, D]."""
        slot = len(self.sequences)
        if slot == len(self.source_lengths):
            self._grow(min(max(2 * slot, 1), self.max_num_seqs))
        self.cache.write_cross(slot, cross_kv)
        self.state.start(slot, sequence.params, self.info.start_token_id)
        self.source_lengths[slot] = len(sequence.source_ids)
        self.sequences.append(sequence)
        self.lengths.append(1)

    def step(self) -> None:
        """Decode one token for every slot, and take out the sequences that are done."""
        size = len(self.sequences)
        state, options = self.state.first(size), self._active_options()
        logits = self.model.decode(
            state.newest_tokens(),
            state.lengths - 1,
            self.cache,
            self.source_lengths[:size],
            target=options.longest,
            source=max(len(s.source_ids) for s in self.sequences),
        )
        advance = advance_greedy if state.live_seqs.shape[1] == 1 else advance_beams
        result = advance(state, logits.float(), self.info.eos_token_id, options)
        if result.parents is not None:
            self.cache.reorder(result.parents, options.longest)
        self.lengths = [length + 1 for length in self.lengths]
        self._retire(result)

    def release(self, sequence: Sequence) -> None:
        """Free a slot; the last one moves into the hole, so that running slots stay contiguous."""
        slot, last = self.sequences.index(sequence), len(self.sequences) - 1
        if slot != last:
            self.state.move(last, slot)
            self.cache.move(last, slot)
            self.source_lengths[slot] = self.source_lengths[last]
            self.sequences[slot], self.lengths[slot] = self.sequences[last], self.lengths[last]
        self.sequences.pop()
        self.lengths.pop()

    def _active_options(self) -> ActiveOptions:
        params = [s.params for s in self.sequences]
        return ActiveOptions(
            longest=max(self.lengths),
            repetition_penalty=any(p.repetition_penalty != 1.0 for p in params),
            largest_ngram=max(p.no_repeat_ngram_size for p in params),
            min_new_tokens=any(n - 1 < p.min_new_tokens for p, n in zip(params, self.lengths, strict=True)),
        )

    def _retire(self, result: StepResult) -> None:
        # The step's only synchronisation with the device: two flags a slot.
        done, failed = torch.stack([result.done, result.failed]).tolist()
        for slot in reversed(range(len(done))):  # from the back: a release moves only slots behind the one it frees
            if not (done[slot] or failed[slot]):
                continue
            sequence = self.sequences[slot]
            if failed[slot]:
                sequence.fail("the model's scores for this text are not numbers")
                self.cache.clear(slot)
            elif hypotheses := self._hypotheses(slot, sequence):
                sequence.finish(hypotheses)
            else:
                sequence.fail("no hypothesis could be finished with these options")
            self.release(sequence)

    def _hypotheses(self, slot: int, sequence: Sequence) -> tuple[Hypothesis, ...]:
        count = sequence.params.num_return_sequences
        seqs = self.state.finished_seqs[slot, :count].tolist()
        scores = self.state.finished_scores[slot, :count].tolist()
        lengths = self.state.finished_lengths[slot, :count].tolist()
        return tuple(
            Hypothesis(tuple(ids[1:length]), score, "eos" if ids[length - 1] == self.info.eos_token_id else "length")
            for ids, score, length in zip(seqs, scores, lengths, strict=True)
            if length > 0  # an entry that no hypothesis ever took
        )

    def _grow(self, capacity: int) -> None:
        # `source_lengths` comes last and says how many slots there are: out of memory before it, nothing has changed.
        self.cache.grow(capacity)
        self.state = self.state.grown(capacity)
        grown = torch.zeros(capacity, dtype=torch.int64, device=self.model.device)
        grown[: len(self.source_lengths)] = self.source_lengths
        self.source_lengths = grown
