"""HTTP/1.1 on one connection: uvicorn's, with a limit for request heads, deadlines, and our body for its errors.

Knows bytes and timers. Does not know routes; bodies have their own bounds in `middleware.py` and `routes/request.py`.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from typing import Any

import h11
from starlette.exceptions import HTTPException
from starlette.requests import Request
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from app.exception_handlers import problem_response


class _Connection(h11.Connection):
    """Refuses what h11 lets pass: a head over the limit that came in one piece, and a body framed in two ways."""

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self.max_head_bytes = max_head_bytes

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            size = len(event.method) + len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
            if size > self.max_head_bytes:
                raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
            names = {name for name, _ in event.headers}
            # h11 believes Transfer-Encoding, a proxy in front may believe Content-Length: they would disagree about
            # where the next request begins. RFC 9112, 6.1, permits to refuse both shapes.
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("two framings of one body")
        return event


class Protocol(H11Protocol):
    """One connection.

    Args:
        header_timeout: seconds for a request's head to arrive whole, from the connection's start or from the head's
            first byte. Whatever comes after a reply that did not wait for its request's body has as long.
        reply_timeout: seconds for the client to take what the kernel's buffers do not hold of a reply.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        header_timeout: float,
        reply_timeout: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert config.h11_max_incomplete_event_size is not None
        self.max_header_bytes = config.h11_max_incomplete_event_size
        self.conn = _Connection(self.max_header_bytes)
        self.header_timeout = header_timeout
        self.reply_timeout = reply_timeout
        self._head_timer: asyncio.TimerHandle | None = None
        self._reply_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin to wait for the first head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` as soon as anything is left over
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Handle what came; a head in pieces has one deadline for all of them."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._unwatch_head()
        self.resume_writing()

    def shutdown(self) -> None:
        """The server ends; a connection that is being closed is left alone, for h11 may know it as broken."""
        if not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        """Give the client time to read."""
        super().pause_writing()
        self._reply_timer = self.loop.call_later(self.reply_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._reply_timer is not None:
            self._reply_timer.cancel()
            self._reply_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 refused; uvicorn calls this while it handles h11's error, which may quote the request."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        details = {
            431: f"The request's head is larger than {self.max_header_bytes} bytes (PRECIS_MAX_HEADER_BYTES).",
            501: "The only Transfer-Encoding that is understood is chunked.",
        }
        self._refuse(status, details.get(status, "The request is not valid HTTP/1.1."))

    def _watch_head(self) -> None:
        # Before a request and after a reply: whatever the client is sending, nobody else sets it a time.
        if self.conn.our_state not in (h11.IDLE, h11.DONE) or self.transport.is_closing():
            self._unwatch_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout, self._head_timed_out)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        begun, _ = self.conn.trailing_data
        if begun and self.conn.our_state is h11.IDLE:
            self._refuse(408, f"The request's head did not arrive within {self.header_timeout:g} s.")
        else:  # nothing was asked, or it has been answered
            self.transport.close()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer with a problem where an answer is still possible, and close."""
        request_id = uuid.uuid4().hex
        scope: dict[str, Any] = {
            "type": "http",
            "headers": [],
            "state": {"request_id": request_id},
            "app": self.config.app,
        }
        problem = problem_response(Request(scope), HTTPException(status, detail))
        headers = [
            *self.server_state.default_headers,
            *problem.raw_headers,
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        start = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        try:
            for event in (start, h11.Data(data=bytes(problem.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:  # another reply is under way, or it was a HEAD
            pass
        if self.cycle is not None:  # a route may still be reading the body that turned out to be none
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
