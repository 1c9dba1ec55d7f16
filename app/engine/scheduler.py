"""Who is admitted, in which order, and who leaves. Plain Python: no torch.

Owns the waiting and the running. Does not know what a sequence holds but its length, its priority and its deadline, nor
how it is computed.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import cache

from app.engine.config import EngineConfig
from app.engine.sequence import Priority, Sequence, SequenceStatus

# Of so many admissions one is a batch's, however many interactive ones wait: no starvation, and no clock needed.
BATCH_EVERY = 8
# What a new sequence needs is told by so many past ones.
REMEMBERED = 64


@dataclass(frozen=True)
class Service:
    """What a sequence asks for, and the seconds that its encoding and decoding took.

    Attributes:
        source_tokens: filled up to a multiple of 64.
    """

    source_tokens: int
    rows: int
    max_new_tokens: int
    seconds: float

    @classmethod
    def of(cls, sequence: Sequence, seconds: float = 0.0) -> Service:
        """What the sequence asks for."""
        return cls(
            -(-len(sequence.source_ids) // 64) * 64, sequence.params.rows, sequence.params.max_new_tokens, seconds
        )

    def asked_no_more_than(self, other: Service) -> bool:
        """In none of the three."""
        return (
            self.source_tokens <= other.source_tokens
            and self.rows <= other.rows
            and self.max_new_tokens <= other.max_new_tokens
        )


class Scheduler:
    """Within a priority first come, first served, within the slots and the encode budget of a step."""

    def __init__(self, config: EngineConfig) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_encode_tokens = config.max_encode_tokens
        self.queues: dict[Priority, deque[Sequence]] = {priority: deque() for priority in Priority}
        self.running: list[Sequence] = []
        self._any_aborted = False
        self._since_batch = 0  # admissions while a batch waited
        self._services: deque[Service] = deque(maxlen=REMEMBERED)

    @property
    def waiting(self) -> list[Sequence]:
        """All that wait, interactive ones first."""
        return [sequence for queue in self.queues.values() for sequence in queue]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.queues[sequence.priority].append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Mark a sequence whose caller left: it never starts, or leaves at the next step."""
        if sequence.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
            sequence.status = SequenceStatus.ABORTED
            self._any_aborted = True

    def remove_aborted(self) -> list[Sequence]:
        """Forget the aborted; returns those that held a slot."""
        if not self._any_aborted:
            return []
        self._any_aborted = False
        for priority, queue in self.queues.items():
            self.queues[priority] = deque(s for s in queue if s.status is not SequenceStatus.ABORTED)
        aborted = [s for s in self.running if s.status is SequenceStatus.ABORTED]
        self.running = [s for s in self.running if s.status is not SequenceStatus.ABORTED]
        return aborted

    def remove_late(self) -> list[Sequence]:
        """Forget, and fail, the waiting that cannot be done by their deadline: nothing is computed for them.

        What a sequence needs is not known before it is decoded. While others run, it is taken to need what the fastest
        of the last ones did that asked for no more than it does; so the slots are not filled with texts that will be
        aborted at their deadline. Where nothing runs, only a deadline that is over is late: it may be worth the try,
        and its time is known afterwards.
        """
        now = time.monotonic()
        slowest = max((service.seconds for service in self._services), default=0.0)
        near = [sequence for sequence in self.waiting if sequence.deadline < now + slowest]
        fastest = cache(self._fastest)  # few ask for different things
        needs = [fastest(Service.of(sequence)) if self.running else 0.0 for sequence in near]
        late = [sequence for sequence, seconds in zip(near, needs, strict=True) if sequence.deadline < now + seconds]
        for sequence in late:
            self.queues[sequence.priority].remove(sequence)
            sequence.is_late = True
            sequence.fail("it could not be done by its deadline")
        return late

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to running while slots and the encode budget last; the first always fits."""
        admitted: list[Sequence] = []
        tokens = 0
        while len(self.running) < self.max_num_seqs and (queue := self._next_queue()):
            tokens += len(queue[0].source_ids)
            if admitted and tokens > self.max_encode_tokens:
                break
            sequence = queue.popleft()
            waits = bool(self.queues[Priority.BATCH])
            self._since_batch = self._since_batch + 1 if waits and sequence.priority is not Priority.BATCH else 0
            sequence.status = SequenceStatus.RUNNING
            sequence.admitted_at = time.monotonic()
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def retire(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that has its result or its error."""
        self.running.remove(sequence)
        if sequence.output is not None:
            seconds = sequence.output.encode_seconds + sequence.output.decode_seconds
            self._services.append(Service.of(sequence, seconds))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running) or any(self.queues.values())

    def _fastest(self, asked: Service) -> float:
        """Seconds, of those of the last that asked for no more; 0 where none did."""
        return min((past.seconds for past in self._services if past.asked_no_more_than(asked)), default=0.0)

    def _next_queue(self) -> deque[Sequence] | None:
        interactive, batch = self.queues[Priority.INTERACTIVE], self.queues[Priority.BATCH]
        first = batch if self._since_batch >= BATCH_EVERY - 1 else interactive
        return first or interactive or batch or None
