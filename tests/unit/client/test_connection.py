"""Requests keep to time, number and Retry-After; the key is sent and nowhere else seen."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from app.client.connection import Connection, deadline_after
from app.client.errors import DeadlineExceeded, EngineFailed, NoReply, QueueFull, Unauthorized
from app.client.retry import RetryPolicy
from tests.unit.client.stub import AT_ONCE, Stub, problem

pytestmark = pytest.mark.anyio
KEY = "sk-very-secret"
OK = httpx.Response(200, json=[])


@asynccontextmanager
async def connected(
    stub: Stub,
    *,
    retry: RetryPolicy = AT_ONCE,
    attempt_timeout: float = 5.0,
    max_concurrency: int = 4,
    api_key: str | None = None,
    base_url: str = "http://stub",
) -> AsyncIterator[Connection]:
    connection = Connection(
        base_url,
        api_key=api_key,
        attempt_timeout=attempt_timeout,
        max_concurrency=max_concurrency,
        retry=retry,
        transport=stub,
    )
    try:
        yield connection
    finally:
        await connection.aclose()


async def ask(connection: Connection, timeout: float | None = None) -> httpx.Response:
    return await connection.ask("POST", "/summarize", b"{}", deadline_after(timeout))


async def test_refusals_and_broken_connections_are_tried_again() -> None:
    stub = Stub(
        problem(429, "queue-full", retry_after="0"),
        httpx.ConnectError("refused"),
        problem(503, "not-ready"),
        httpx.ReadError("reset"),
        problem(504, "deadline-exceeded"),
        httpx.RemoteProtocolError("closed in the middle"),
        OK,
    )
    async with connected(stub) as connection:
        assert await ask(connection) is OK
    assert len(stub.requests) == 7


async def test_tries_are_bounded_and_the_last_error_is_raised() -> None:
    stub = Stub(*(problem(429, "queue-full", retry_after="0") for _ in range(9)))
    async with connected(stub, retry=RetryPolicy(max_retries=2, first_wait=0)) as connection:
        with pytest.raises(QueueFull) as caught:
            await ask(connection)
    assert (caught.value.status, caught.value.request_id, len(stub.requests)) == (429, "r-1", 3)


async def test_a_failed_generation_is_not_tried_again() -> None:
    stub = Stub(problem(500, "generation-failed"), OK)
    async with connected(stub) as connection:
        with pytest.raises(EngineFailed):
            await ask(connection)
    assert len(stub.requests) == 1


async def test_retry_after_is_waited_for() -> None:
    stub = Stub(problem(503, "not-ready", retry_after="1"), OK)
    async with connected(stub) as connection:
        started = time.monotonic()
        await ask(connection)
    assert 1.0 <= time.monotonic() - started < 2.0


async def test_a_wait_that_would_outlast_the_deadline_is_not_begun() -> None:
    stub = Stub(problem(429, "queue-full", retry_after="30"))
    async with connected(stub) as connection:
        started = time.monotonic()
        with pytest.raises(QueueFull) as caught:
            await ask(connection, timeout=20)
    assert caught.value.retry_after == 30
    assert time.monotonic() - started < 10


async def test_the_deadline_ends_a_call_that_hangs() -> None:
    stub = Stub()
    stub.seconds = 60
    async with connected(stub) as connection:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await ask(connection, timeout=0.2)
        assert 0.2 <= time.monotonic() - started < 10
    assert stub.cancelled == 1


async def test_the_deadline_counts_the_wait_for_a_slot() -> None:
    stub = Stub(OK)
    stub.seconds = 0.6
    async with connected(stub, max_concurrency=1) as connection:
        first = asyncio.create_task(ask(connection))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await ask(connection, timeout=0.1)
        await first
    assert len(stub.requests) == 1


async def test_a_try_that_takes_too_long_is_given_up_and_made_again() -> None:
    stub = Stub(OK)
    stub.seconds = 60
    async with connected(stub, attempt_timeout=0.05, retry=RetryPolicy(max_retries=1, first_wait=0)) as connection:
        with pytest.raises(NoReply, match=r"within 0\.05 s"):
            await ask(connection)
    assert (len(stub.requests), stub.cancelled) == (2, 2)


async def test_the_server_is_told_how_long_anybody_waits() -> None:
    stub = Stub(OK, OK)
    async with connected(stub, attempt_timeout=50) as connection:
        await ask(connection)
        await ask(connection, timeout=20)
    without, within = (float(request.headers["x-request-timeout"]) for request in stub.requests)
    assert without == 50
    assert 15 < within <= 20


async def test_no_more_requests_at_once_than_allowed() -> None:
    stub = Stub(*[OK] * 20)
    stub.seconds = 0.01
    async with connected(stub, max_concurrency=3) as connection:
        await asyncio.gather(*(ask(connection) for _ in range(20)))
    assert stub.most_running == 3


async def test_the_key_is_sent_and_in_no_log_message_or_repr(caplog: pytest.LogCaptureFixture) -> None:
    stub = Stub(problem(503, "not-ready"), problem(401, "unauthorized", detail="Give a key."))
    with caplog.at_level(logging.DEBUG):
        async with connected(stub, api_key=KEY) as connection:
            with pytest.raises(Unauthorized) as caught:
                await ask(connection)
            shown = repr(connection) + repr(vars(connection)) + repr(connection.base_url)
    assert [request.headers["authorization"] for request in stub.requests] == [f"Bearer {KEY}"] * 2
    assert "503" in caplog.text  # what is told of a retry
    assert KEY not in caplog.text + shown + repr(caught.value) + repr(vars(caught.value))


@pytest.mark.parametrize("key", ["with blank", "line\nfeed", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_have_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Connection("http://stub", api_key=key, attempt_timeout=1, max_concurrency=1, retry=AT_ONCE, transport=Stub())
    assert key not in str(caught.value)


def test_a_key_and_a_user_in_the_url_are_refused_for_one_would_replace_the_other() -> None:
    with pytest.raises(ValueError, match="room for one") as caught:
        Connection(
            "http://user:pw@stub", api_key=KEY, attempt_timeout=1, max_concurrency=1, retry=AT_ONCE, transport=Stub()
        )
    assert KEY not in str(caught.value)


async def test_without_a_key_no_authorization_is_sent() -> None:
    stub = Stub(OK)
    async with connected(stub) as connection:
        await ask(connection)
    assert "authorization" not in stub.requests[0].headers


@pytest.mark.parametrize("url", ["", "stub:8000", "ftp://stub", "/summarize", "http://"])
def test_a_url_that_is_none_is_refused_before_any_request(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        Connection(url, api_key=None, attempt_timeout=1, max_concurrency=1, retry=AT_ONCE, transport=Stub())


@pytest.mark.parametrize(
    ("attempt_timeout", "max_concurrency"), [(0, 1), (-1, 1), (math.inf, 1), (math.nan, 1), (1, 0)]
)
def test_numbers_that_would_hang_are_refused(attempt_timeout: float, max_concurrency: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Connection(
            "http://stub",
            api_key=None,
            attempt_timeout=attempt_timeout,
            max_concurrency=max_concurrency,
            retry=AT_ONCE,
            transport=Stub(),
        )


async def test_a_prefix_of_the_url_is_kept() -> None:
    stub = Stub(OK)
    async with connected(stub, base_url="http://gateway/precis/") as connection:
        await ask(connection)
    assert str(stub.requests[0].url) == "http://gateway/precis/summarize"


async def test_a_redirect_is_not_followed_for_the_key_would_go_along() -> None:
    stub = Stub(httpx.Response(307, headers={"location": "http://elsewhere/"}))
    async with connected(stub, api_key=KEY) as connection:
        with pytest.raises(Exception, match="307"):
            await ask(connection)
    assert len(stub.requests) == 1
