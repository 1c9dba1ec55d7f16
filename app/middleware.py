"""Pure ASGI around every request: its id and trace, its body's limit, its duration, and the reply to the unforeseen.

Knows HTTP messages. Does not know routes or models.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge
from app.exception_handlers import problem_response
from app.logs import request_lines
from app.metrics import Metrics
from app.tracing import RequestTrace, Tracing, use

logger = logging.getLogger("app.access")

_REQUEST_ID = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,126}[\x21-\x7e])?")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestMiddleware:
    """Sits inside CORS and outside everything else, so that every reply has its headers."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        tracing: Tracing,
        model_name: Callable[[], str | None],
        max_body_bytes: int,
    ) -> None:
        """`model_name`: of what is served when it is asked; None before there is a model."""
        self.app = app
        self.metrics = metrics
        self.tracing = tracing
        self.model_name = model_name
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get("x-request-id"))
        trace = self.tracing.request(scope["method"], {name: ", ".join(headers.getlist(name)) for name in headers})
        scope.setdefault("state", {})["request_id"] = request_id
        with request_lines(request_id, trace.trace_id), use(trace):
            await self._serve(scope, receive, send, request_id, trace)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request_id: str, trace: RequestTrace) -> None:
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-total-time"] = milliseconds(time.perf_counter() - started)
            await send(message)

        try:
            await self.app(scope, self._bounded(scope, receive), send_with_headers)
        except Exception as error:
            if status:  # half a reply is out; closing the connection is all that is left
                logger.error("the reply broke off: %s", type(error).__name__)
                raise
            await problem_response(Request(scope), error)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started, trace)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that counts the body's bytes, whatever Content-Length says, and stops at the limit."""
        declared = Headers(scope=scope).get("content-length", "")
        too_long = declared.isdecimal() and int(declared[:20]) > self.max_body_bytes
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive() if not too_long else {"type": "http.request"}
            read += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if too_long or read > self.max_body_bytes:
                raise BodyTooLarge(f"The body is larger than {self.max_body_bytes} bytes (PRECIS_MAX_BODY_BYTES).")
            return message

        return bounded

    def _record(self, scope: Scope, status: int, seconds: float, trace: RequestTrace) -> None:
        matched = getattr(scope.get("route"), "path", None)
        route = matched or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.requests.labels(method=method, route=route, status=str(status or 499)).inc()
        self.metrics.request_duration.labels(route=route).observe(seconds)
        trace.end(method, matched, status, self.model_name(), seconds)
        fields = {"method": method, "route": route, "status": status or 499, "duration_ms": round(seconds * 1000)}
        logger.info("%s %s %s %s ms", *fields.values(), extra=fields)


def request_id_of(sent: str | None) -> str:
    """The caller's id if it is at most 128 printable characters, else a new one."""
    return sent if sent is not None and _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def milliseconds(seconds: float) -> str:
    """As headers say it."""
    return str(round(seconds * 1000))
