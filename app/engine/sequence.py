"""One text on its way through the engine, and what comes out of it. Standard library only.

Knows its own state. Does not know slots' tensors, batch-mates or the caller.
"""

from __future__ import annotations

import enum
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Literal

from app.engine.config import GenerationParams

_ids = itertools.count()


class Priority(enum.IntEnum):
    """Who is admitted first; see `Scheduler`."""

    INTERACTIVE = 0
    BATCH = 1


class SequenceStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED; ABORTED from either of the first two."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()
    ABORTED = enum.auto()


@dataclass(frozen=True)
class Hypothesis:
    """One output.

    Attributes:
        token_ids: generated ids; the end token is included, the start token and padding are not.
        token_logprobs: the log-probability of each token, after processors. For beams they sum up to the score times
            `length ** length_penalty`.
        score: `sequences_scores` of `generate` for beams; the mean of `token_logprobs` for greedy and sampling.
        finish_reason: "eos" if the model ended it, "length" if `max_new_tokens` cut it.
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float
    finish_reason: Literal["eos", "length"]


@dataclass(frozen=True)
class SequenceOutput:
    """All hypotheses of one sequence, best first (samples: as drawn), and where its time went."""

    hypotheses: tuple[Hypothesis, ...]
    queue_seconds: float
    encode_seconds: float
    decode_seconds: float


@dataclass(eq=False)
class Sequence:
    """One source and how to decode it. Times are `time.monotonic()` seconds.

    Attributes:
        priority: who is admitted first.
        deadline: when nobody waits for the result any more; it is not encoded if it cannot be done by then.
        streams: whether `certain_ids` are wanted.
        certain_ids: the tokens with which the result will begin, whatever is still decoded; only ever grows.
        is_late: dropped because of its deadline.
    """

    source_ids: tuple[int, ...]
    params: GenerationParams
    priority: Priority = Priority.INTERACTIVE
    deadline: float = math.inf
    streams: bool = False
    certain_ids: tuple[int, ...] = ()
    is_late: bool = False
    id: int = field(default_factory=lambda: next(_ids))
    status: SequenceStatus = SequenceStatus.WAITING
    arrived_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    encoded_at: float = 0.0
    output: SequenceOutput | None = None
    error: str | None = None

    def finish(self, hypotheses: tuple[Hypothesis, ...]) -> None:
        """Hold the result."""
        now = time.monotonic()
        self.status = SequenceStatus.FINISHED
        self.output = SequenceOutput(
            hypotheses=hypotheses,
            queue_seconds=self.admitted_at - self.arrived_at,
            encode_seconds=self.encoded_at - self.admitted_at,
            decode_seconds=now - self.encoded_at,
        )

    def fail(self, error: str) -> None:
        """Hold the reason why there is no result."""
        self.status = SequenceStatus.FINISHED
        self.error = error
