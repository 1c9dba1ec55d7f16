"""How much work the server takes in: requests and source tokens, each with a bound, and when to come back.

Knows how fast admitted work has finished lately. Does not know what the work is, nor HTTP.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import BatchTooLarge, QueueFull

LONGEST_RETRY = 600  # seconds


class Meter:
    """So much of one thing is inside now, and so much of it left in the last minute."""

    WINDOW_SECONDS = 60.0

    def __init__(self, limit: int, unit: str) -> None:
        self.limit = limit
        self.unit = unit
        self.inside = 0
        self._left: deque[tuple[float, int]] = deque()
        self._busy_since = 0.0

    def enter(self, count: int) -> None:
        """Take room.

        Raises:
            QueueFull: there is none, with the seconds until there will be.
        """
        if self.inside + count > self.limit:
            seconds = self.retry_after(count)
            raise QueueFull(
                f"The queue is full: {self.inside} {self.unit} are in it, the limit is {self.limit}; "
                f"try again in {seconds} s.",
                seconds,
            )
        if self.inside == 0:
            self._busy_since = time.monotonic()
        self.inside += count

    def leave(self, count: int, served: bool) -> None:
        """Give room back; `served` says whether work was done for it."""
        self.inside -= count
        if served:
            self._left.append((time.monotonic(), count))
            self._forget_old()

    def retry_after(self, count: int) -> int:
        """Whole seconds until there is room for `count`, at the rate at which the last minute's left."""
        done, elapsed = self._lately()
        missing = self.inside + count - self.limit
        # Nothing has left yet: it takes at least as long again.
        seconds = missing * elapsed / done if done else elapsed
        return min(LONGEST_RETRY, max(1, math.ceil(seconds)))

    def rate(self) -> float:
        """How many left in a second, in the last minute."""
        done, elapsed = self._lately()
        return done / elapsed if elapsed else 0.0

    def _lately(self) -> tuple[int, float]:
        """How many left in the last minute, or since there was something inside, and the seconds that this is."""
        now = time.monotonic()
        self._forget_old()
        since = max(self._busy_since, now - self.WINDOW_SECONDS)
        return sum(left for at, left in self._left if at >= since), now - since

    def _forget_old(self) -> None:
        oldest = time.monotonic() - self.WINDOW_SECONDS
        while self._left and self._left[0][0] < oldest:
            self._left.popleft()


class Admission:
    """Bounds requests being answered, and source tokens admitted and not finished."""

    def __init__(self, max_tokens: int, max_requests: int) -> None:
        self._tokens = Meter(max_tokens, "source tokens")
        self._requests = Meter(max_requests, "requests")

    @property
    def tokens(self) -> int:
        """Source tokens admitted and not finished."""
        return self._tokens.inside

    @property
    def requests(self) -> int:
        """Requests being answered."""
        return self._requests.inside

    @property
    def tokens_per_second(self) -> float:
        """Source tokens of the texts that were served in the last minute, a second."""
        return self._tokens.rate()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold a request's place, from before its texts are looked at until it is answered.

        Raises:
            QueueFull: too many requests are being answered.
        """
        self._requests.enter(1)
        served = False
        try:
            yield
            served = True
        finally:
            self._requests.leave(1, served)

    def admit(self, tokens: int) -> None:
        """Take room for `tokens`, to be given back by `finish`, in parts.

        Raises:
            BatchTooLarge: there would not be room if the queue were empty.
            QueueFull: there is no room now.
        """
        if tokens > self._tokens.limit:
            raise BatchTooLarge(f"The texts have {tokens} source tokens in all; the limit is {self._tokens.limit}.")
        self._tokens.enter(tokens)

    def finish(self, tokens: int, served: bool) -> None:
        """Give room back; `served` says whether work was done for it."""
        self._tokens.leave(tokens, served)
