"""What Serve's HTTP proxies are told: a request whose replica ended is answered 503, so that its caller asks again.

Serve lets such a request fall: its proxy sends nothing, and uvicorn makes a 500 of it. A 500 means that the request is
at fault, and clients do not repeat it; here the request is well, its replica is gone and another is there. Named by
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.proxy:middlewares in the environment of every node.

Knows ASGI. Does not know Ray, nor what is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETRY_SECONDS = 1
REQUEST_ID = b"x-request-id"
DETAIL = "The replica that worked on this request ended before it had answered; try again."


class LostReplica:
    """Answers what the application left unanswered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False
        left = False

        async def watched_receive() -> Message:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                message = {**message, "headers": once(message["headers"])}
            await send(message)

        await self.app(scope, watched_receive, watched_send)
        if not begun and not left:
            body = json.dumps(
                {
                    "type": "/problems/replica-lost",
                    "title": "Replica lost",
                    "status": 503,
                    "detail": DETAIL,
                    "error": DETAIL,
                    "error_type": "unavailable",
                }
            ).encode()
            headers = [
                (b"content-type", b"application/problem+json"),
                (b"content-length", str(len(body)).encode()),
                (b"retry-after", str(RETRY_SECONDS).encode()),
            ]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def once(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers, of X-Request-Id the first: the application's, to which Serve adds its own."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name.lower() != REQUEST_ID or all(name.lower() != REQUEST_ID for name, _ in kept):
            kept.append((name, value))
    return kept


def middlewares() -> list[Middleware]:
    """Called once by each proxy."""
    return [Middleware(LostReplica)]
