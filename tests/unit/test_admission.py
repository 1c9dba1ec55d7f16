"""Room for work, and an honest word on when there will be some again."""

from __future__ import annotations

import pytest

from app.admission import Admission
from app.errors import BatchTooLarge, QueueFull


def test_tokens_are_bounded_and_their_rate_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("app.admission.time.monotonic", lambda: now)
    admission = Admission(max_tokens=100, max_requests=9)
    with pytest.raises(BatchTooLarge):
        admission.admit(101)
    admission.admit(60)
    now += 4.0
    with pytest.raises(QueueFull) as caught:
        admission.admit(50)
    assert caught.value.retry_after == 4  # nothing finished in 4 s
    assert admission.tokens_per_second == 0
    admission.finish(20, served=True)
    assert admission.tokens_per_second == 5
    admission.admit(50)
    with pytest.raises(QueueFull) as caught:
        admission.admit(60)
    assert caught.value.retry_after == 10  # 50 tokens must leave, at 20 in 4 s
    admission.finish(90, served=False)
    assert admission.tokens == 0
    now += 61.0
    assert admission.tokens_per_second == 0


def test_requests_are_bounded_and_their_rate_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("app.admission.time.monotonic", lambda: now)
    admission = Admission(max_tokens=9, max_requests=2)
    with admission.request():
        with admission.request():
            now += 3.0
        with (
            admission.request(),
            pytest.raises(QueueFull, match="2 requests are in it, the limit is 2") as caught,
            admission.request(),
        ):
            pass
        assert caught.value.retry_after == 3  # one left in three seconds
    assert admission.requests == 0


def test_a_request_that_fails_gives_its_place_back() -> None:
    admission = Admission(max_tokens=9, max_requests=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"), admission.request():
            raise ValueError("no")
    assert admission.requests == 0
