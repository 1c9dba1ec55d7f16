"""Who is admitted and who leaves. Plain Python: no torch.

Owns the waiting and the running. Does not know what a sequence holds but its length, nor how it is computed.
"""

from __future__ import annotations

import time
from collections import deque

from app.engine.config import EngineConfig
from app.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    """First come, first served, within the slots and the encode budget of a step."""

    def __init__(self, config: EngineConfig) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_encode_tokens = config.max_encode_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Mark a sequence whose caller left: it never starts, or leaves at the next step."""
        if sequence.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
            sequence.status = SequenceStatus.ABORTED

    def remove_aborted(self) -> list[Sequence]:
        """Forget the aborted; returns those that held a slot."""
        self.waiting = deque(s for s in self.waiting if s.status is not SequenceStatus.ABORTED)
        aborted = [s for s in self.running if s.status is SequenceStatus.ABORTED]
        self.running = [s for s in self.running if s.status is not SequenceStatus.ABORTED]
        return aborted

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to running while slots and the encode budget last; the first always fits."""
        admitted: list[Sequence] = []
        longest = 0  # the encoder pads every source to it
        while self.waiting and len(self.running) < self.max_num_seqs:
            longest = max(longest, len(self.waiting[0].source_ids))
            if admitted and longest * (len(admitted) + 1) > self.max_encode_tokens:
                break
            sequence = self.waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            sequence.admitted_at = time.monotonic()
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def retire(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that has its result or its error."""
        self.running.remove(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)
