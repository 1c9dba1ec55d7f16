"""Waits grow, are never shorter than Retry-After, and end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.client.errors import BadReply, ClientError, DeadlineExceeded, EngineFailed, NoReply, QueueFull
from app.client.retry import RetryPolicy

LONGEST = RetryPolicy(max_retries=10_000, uniform=lambda low, high: high)


def test_waits_double_up_to_the_longest() -> None:
    waits = [LONGEST.wait(NoReply("dropped"), retries) for retries in range(8)]
    assert waits == [0.5, 1, 2, 4, 8, 16, 20, 20]
    assert LONGEST.wait(NoReply("dropped"), 9_999) == 20


@given(st.integers(0, 600), st.integers(0, 5), st.sampled_from([429, 503, 504]))
def test_never_sooner_than_retry_after_and_jitter_only_adds(seconds: int, retries: int, status: int) -> None:
    wait = RetryPolicy().wait(ClientError("m", status=status, retry_after=seconds), retries)
    assert wait is not None
    assert seconds <= wait <= seconds + 0.5 * 2**retries


@pytest.mark.parametrize("max_retries", [0, 1, 6])
def test_no_more_retries_than_allowed(max_retries: int) -> None:
    policy = RetryPolicy(max_retries=max_retries)
    assert policy.wait(QueueFull("full", status=429), max_retries) is None
    assert max_retries == 0 or policy.wait(QueueFull("full", status=429), max_retries - 1) is not None


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (NoReply("refused"), True),
        (ClientError("m", status=408), True),
        (ClientError("m", status=429), True),
        (ClientError("m", status=502), True),
        (ClientError("m", status=503), True),
        (ClientError("m", status=504), True),
        (DeadlineExceeded("the call's own"), False),
        (EngineFailed("m", status=500), False),
        (BadReply("m", status=200), False),
        (ClientError("m", status=401), False),
        (ClientError("m", status=413), False),
        (ClientError("m", status=422), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: ClientError, again: bool) -> None:
    assert (RetryPolicy().wait(error, 0) is not None) == again


def test_a_caller_may_have_500_tried_again() -> None:
    policy = RetryPolicy(statuses=frozenset({500}))
    assert policy.wait(EngineFailed("m", status=500), 0) is not None
