"""A request that was left without an answer gets one; every other passes as it is."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.client.errors import from_reply
from app.client.retry import RetryPolicy
from deploy.ray.proxy import LostReplica, middlewares

Messages = list[MutableMapping[str, Any]]


def through(inner: ASGIApp, received: str = "http.request") -> Messages:
    sent: Messages = []

    async def receive() -> dict[str, Any]:
        return {"type": received}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    app = middlewares()[0]
    wrapped = app.cls(inner, *app.args, **app.kwargs)
    asyncio.run(wrapped({"type": "http"}, receive, send))  # type: ignore[arg-type]
    return sent


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve's proxy does when a replica ends under a request."""
    await receive()


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"x-request-id", b"ours"), (b"retry-after", b"7"), (b"X-Request-ID", b"Serve's")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": b"own"})


def test_a_request_left_unanswered_gets_503_that_our_client_repeats() -> None:
    start, body = through(silent)
    assert start["status"] == 503
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert int(headers["content-length"]) == len(body["body"])
    wait = RetryPolicy().wait(from_reply(503, headers, body["body"]), 0)
    assert wait is not None
    assert wait >= int(headers["retry-after"])


def test_an_answer_passes_whatever_its_status_with_one_request_id() -> None:
    start, body = through(answers)
    assert start["status"] == 500
    assert start["headers"] == [(b"x-request-id", b"ours"), (b"retry-after", b"7")]
    assert body["body"] == b"own"


def test_who_left_is_not_answered() -> None:
    assert through(silent, "http.disconnect") == []


def test_what_is_not_http_passes() -> None:
    seen: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(LostReplica(inner)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
