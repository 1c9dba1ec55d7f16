"""Whether to try again, and when.

Knows errors. Does not know requests, clocks or deadlines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from app.client.errors import ClientError, NoReply

# 408 and 502 are about the way to the server; 500 is not here: what failed once fails again as a rule.
STATUSES = frozenset({408, 429, 502, 503, 504})


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with full jitter, on top of what `Retry-After` says.

    Attributes:
        max_retries: tries after the first, for each request; 0 is none.
        first_wait: seconds; the most that jitter draws before the first retry. It doubles with each.
        longest_wait: seconds; the most that it grows to. Retry-After is not bounded by it: that is the server's word.
        statuses: replies that are worth another try. No reply at all always is.
        uniform: draws the jitter between two bounds.
    """

    max_retries: int = 6
    first_wait: float = 0.5
    longest_wait: float = 20.0
    statuses: frozenset[int] = STATUSES
    uniform: Callable[[float, float], float] = random.uniform

    def wait(self, error: ClientError, retries: int) -> float | None:
        """Seconds to wait before the next try, after so many retries; None is to give up."""
        if retries >= self.max_retries or not (isinstance(error, NoReply) or error.status in self.statuses):
            return None
        bound = min(self.longest_wait, self.first_wait * 2.0 ** min(retries, 32))
        return (error.retry_after or 0) + self.uniform(0, bound)
