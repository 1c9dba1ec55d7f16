"""A server in the place of the network: it answers each text with itself in upper case, unless told otherwise.

Knows the HTTP contract. Does not know sockets: tests/integration/test_client.py has those.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import httpx

from app.client import RetryPolicy

AT_ONCE = RetryPolicy(first_wait=0.0)
LIMITS = {"max_input_tokens": 512, "max_batch_size": 4, "max_body_bytes": 1 << 20, "max_queue_tokens": 65536}
INFO = {"model_id": "stub", "device": "cpu", "dtype": "float32", "limits": LIMITS, "defaults": {"num_beams": 4}}


def item(text: str) -> dict[str, Any]:
    """The summary of a text, as the wire has it."""
    return {
        "summary_text": text.upper(),
        "score": -0.5,
        "finish_reason": "eos",
        "output_tokens": 3,
        "input_tokens": 5,
        "source_tokens": 5,
        "truncated": False,
    }


def problem(
    status: int, slug: str, errors: Iterable[dict[str, Any]] = (), detail: str = "No.", **headers: str
) -> httpx.Response:
    """An error reply of the server; `retry_after="1"` is a header."""
    body = {"type": f"/problems/{slug}", "status": status, "detail": detail, "errors": list(errors)}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json=body, headers={"x-request-id": "r-1"} | named)


class Stub(httpx.AsyncBaseTransport):
    """Answers, and remembers what it was asked.

    Attributes:
        replies: given one by one before anything else; an exception is raised, as a broken connection is.
        bad: texts that are refused by name.
        failing: texts that fail a whole batch without being named.
        seconds: a reply takes.
    """

    def __init__(self, *replies: httpx.Response | Exception, **limits: int) -> None:
        self.replies = list(replies)
        self.info = INFO | {"limits": LIMITS | limits}
        self.bad: set[str] = set()
        self.failing: set[str] = set()
        self.seconds = 0.0
        self.requests: list[httpx.Request] = []
        self.batches: list[list[str]] = []
        self.running = self.most_running = self.cancelled = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if request.url.path.endswith("/info"):
            return httpx.Response(200, json=self.info)
        if self.replies:
            reply = self.replies.pop(0)
            if isinstance(reply, Exception):
                raise reply
            return reply
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["inputs"]
        self.batches.append(texts)
        bad = [index for index, text in enumerate(texts) if text in self.bad]
        if bad:
            errors = [{"index": i, "pointer": f"/inputs/{i}", "message": f"inputs[{i}] is too long."} for i in bad]
            return problem(413, "input-too-long", errors, " ".join(str(e["message"]) for e in errors))
        if self.failing & set(texts):
            return problem(500, "generation-failed")
        if request.url.path.endswith("/tokenize"):
            return httpx.Response(200, json=[{"tokens": len(text), "limit": 9, "excess": 0} for text in texts])
        return httpx.Response(200, json=[item(text) for text in texts])


def stream(*events: tuple[str, Any], comment: str = "") -> httpx.Response:
    """A reply of server-sent events."""
    text = comment + "".join(
        f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n" for name, data in events
    )
    return httpx.Response(200, content=text.encode(), headers={"content-type": "text/event-stream; charset=utf-8"})
