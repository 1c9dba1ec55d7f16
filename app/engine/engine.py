"""The synchronous engine: `step()` is the whole of it.

Knows the order of things. Does not know tensors (the runner does), fairness (the scheduler does) or threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from pathlib import Path

from app.engine.checkpoint import Checkpoint, load_checkpoint
from app.engine.config import EngineConfig, GenerationParams
from app.engine.model_runner import ModelRunner
from app.engine.scheduler import Scheduler
from app.engine.sequence import Sequence, SequenceOutput, SequenceStatus
from app.engine.tally import Tally
from app.errors import EngineFailed

logger = logging.getLogger(__name__)


class Engine:
    """Sequences in, outputs out, batched in flight: they join and leave between decode steps."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.config = config
        self.info = checkpoint.info
        self.generation_config = checkpoint.generation_config
        own_maximum = GenerationParams.from_generation_config(checkpoint.generation_config).max_new_tokens
        self.max_output_tokens = min(config.max_output_tokens or own_maximum, self.info.max_target_tokens)
        self.scheduler = Scheduler(config)
        self.runner = ModelRunner(checkpoint, config, self.max_output_tokens)
        self.tally = Tally(config.max_num_seqs)

    @classmethod
    def from_folder(cls, folder: Path, config: EngineConfig) -> Engine:
        """Load a folder in the Hugging Face layout; raises CheckpointError if it cannot be served."""
        return cls(load_checkpoint(Path(folder), config.device, config.dtype), config)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises ValueError as `check` does."""
        self.check(sequence)
        self.scheduler.add(sequence)

    def check(self, sequence: Sequence) -> None:
        """Let a sequence pass that can be decoded.

        Raises:
            ValueError: the source or the options are beyond what was fixed at start.
        """
        limits = (
            ("source tokens", len(sequence.source_ids), self.info.max_source_tokens),
            ("num_beams, or samples", sequence.params.rows, self.config.max_num_beams),
            ("max_new_tokens", sequence.params.max_new_tokens, self.max_output_tokens),
            ("token ids", max(sequence.params.token_ids(), default=0), self.info.vocab_size - 1),
        )
        for name, value, limit in limits:
            if value > limit:
                raise ValueError(f"{name}: {value} is over the limit of {limit}")
        if not sequence.source_ids:
            raise ValueError("source tokens: there are none")
        if sequence.params.encoder_no_repeat_ngram_size and not self.info.one_vocabulary:
            raise ValueError("encoder_no_repeat_ngram_size: the source's tokens are of another vocabulary")

    def step(self) -> list[Sequence]:
        """Let the aborted and the late go, admit and encode who fits, decode a token for all; returns the finished."""
        for sequence in self.scheduler.remove_aborted():
            self.runner.release(sequence)
        late = self.scheduler.remove_late()
        self.tally.late += len(late)
        self._encode(self.scheduler.admit())
        self._decode()
        finished = [s for s in self.scheduler.running if s.status is SequenceStatus.FINISHED]
        for sequence in finished:
            self.scheduler.retire(sequence)
        return late + finished

    def generate(
        self,
        sources: ListLike[ListLike[int]],
        params: GenerationParams,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[SequenceOutput]:
        """Decode many sources and return their outputs in input order, for offline use.

        Args:
            sources: token ids, special tokens included.
            params: the options of all of them.
            on_finished: called with the number of finished sources, each time it grows.

        Raises:
            ValueError: a source or the options cannot be decoded; nothing was then.
            EngineFailed: a sequence or a step failed.
        """
        sequences = [Sequence(tuple(ids), params) for ids in sources]
        for sequence in sequences:
            self.check(sequence)
        # Longest first: the last ones to finish are short, and few steps run with few sequences.
        for sequence in sorted(sequences, key=lambda s: len(s.source_ids), reverse=True):
            self.scheduler.add(sequence)
        own, count = {sequence.id for sequence in sequences}, 0
        while self.scheduler.has_work:
            finished = [sequence for sequence in self.step() if sequence.id in own]
            count += len(finished)
            if finished and on_finished is not None:
                on_finished(count)
        outputs = []
        for sequence in sequences:
            if sequence.output is None:
                raise EngineFailed(sequence.error or "the sequence was aborted")
            outputs.append(sequence.output)
        return outputs

    def _encode(self, admitted: list[Sequence]) -> None:
        """Encode the admitted together; if that fails, one by one, so that only the culprit fails."""
        if not admitted:
            return
        try:
            self._admit(admitted)
            one_by_one = []
        except Exception:
            logger.exception("encoding %d sequences failed; trying them one by one", len(admitted))
            one_by_one = admitted  # when the error has let go of what the attempt held in memory
        for sequence in one_by_one:
            self._encode_alone(sequence)
        now = time.monotonic()
        for sequence in admitted:
            sequence.encoded_at = now

    def _encode_alone(self, sequence: Sequence) -> None:
        self.runner.release(sequence)  # it may have got its slot before another one failed
        try:
            self._admit([sequence])
        except Exception as error:
            self.runner.release(sequence)
            sequence.fail(f"encoding failed: {type(error).__name__}")

    def _admit(self, sequences: list[Sequence]) -> None:
        started = time.monotonic()
        self.runner.admit(sequences)
        self.tally.encode_seconds.observe(time.monotonic() - started)

    def _decode(self) -> None:
        """One decode step; if it fails, the sequences then running fail with it and the queue goes on."""
        running = [s for s in self.scheduler.running if s.status is SequenceStatus.RUNNING]
        if not running:
            return
        started = time.monotonic()
        try:
            self.runner.step()
        except Exception as error:
            logger.exception("a decode step failed; %d running sequences fail with it", len(self.scheduler.running))
            self.runner.reset()
            for sequence in running:
                if sequence.status is SequenceStatus.RUNNING:
                    sequence.fail(f"a decode step failed: {type(error).__name__}")
        else:
            self.tally.step_seconds.observe(time.monotonic() - started)
            self.tally.step_texts.observe(len(running))
            self.tally.rows += sum(sequence.params.rows for sequence in running)
