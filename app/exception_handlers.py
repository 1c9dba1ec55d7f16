"""The one table from error class to HTTP reply, and the body that every error has.

Knows status codes, RFC 9457, and what Hugging Face's clients read. Does not know why an error was raised.
"""

from __future__ import annotations

import http
import json
import logging
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from app import errors
from app.schemas import Problem

logger = logging.getLogger(__name__)

MAX_ERRORS = 50  # of one reply
MAX_HEADER = 512
RETRY_SECONDS = 5


@dataclass(frozen=True)
class Reply:
    """What HTTP makes of an error class."""

    status: int
    slug: str
    title: str
    error_type: str


# The most derived class counts.
REPLIES: Mapping[type[Exception], Reply] = {
    errors.MalformedJSON: Reply(400, "malformed-json", "Malformed JSON", "validation"),
    errors.UnknownModel: Reply(404, "unknown-model", "Unknown model", "validation"),
    errors.Unauthorized: Reply(401, "unauthorized", "Unauthorized", "authentication"),
    errors.NotAcceptable: Reply(406, "not-acceptable", "Not acceptable", "validation"),
    errors.BodyTimeout: Reply(408, "body-timeout", "Body timeout", "validation"),
    errors.InputTooLong: Reply(413, "input-too-long", "Input too long", "validation"),
    errors.BatchTooLarge: Reply(413, "batch-too-large", "Batch too large", "validation"),
    errors.BodyTooLarge: Reply(413, "body-too-large", "Body too large", "validation"),
    errors.UnsupportedMedia: Reply(415, "unsupported-media-type", "Unsupported media type", "validation"),
    errors.RequestError: Reply(422, "invalid-request", "Invalid request", "validation"),
    errors.RateLimited: Reply(429, "rate-limited", "Rate limited", "overloaded"),
    errors.QueueFull: Reply(429, "queue-full", "Queue full", "overloaded"),
    ClientDisconnect: Reply(499, "client-left", "Client left", "cancelled"),  # never sent
    errors.EngineFailed: Reply(500, "generation-failed", "Generation failed", "generation"),
    errors.EngineStopped: Reply(503, "engine-stopped", "Engine stopped", "unavailable"),
    errors.DeadlineExceeded: Reply(504, "deadline-exceeded", "Deadline exceeded", "timeout"),
    errors.NotReady: Reply(503, "not-ready", "Not ready", "unavailable"),
    Exception: Reply(500, "internal-error", "Internal error", "internal"),
}


def install(app: FastAPI) -> None:
    """Answer every error with the same body; what nobody foresaw is answered by the outermost middleware."""
    for kind in (errors.PrecisError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, handle)


async def handle(request: Request, error: Exception) -> Response:
    """The reply to an error."""
    return problem_response(request, error)


def problem_response(request: Request, error: Exception) -> Response:
    """Build the reply, and count and log the error; never with the text of an unforeseen exception."""
    headers: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    if isinstance(error, HTTPException):
        title = http.HTTPStatus(error.status_code).phrase
        reply = Reply(error.status_code, title.lower().replace(" ", "-"), title, "validation")
        detail = _http_detail(error, request)
        headers.update(error.headers or {})
    else:
        reply = next(REPLIES[kind] for kind in type(error).__mro__ if kind in REPLIES)
        detail = str(error) if isinstance(error, errors.PrecisError) else "The server failed to answer; see its log."
        found = list(error.errors) if isinstance(error, errors.RequestError) else []
    if isinstance(error, errors.Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, errors.RateLimited):
        headers.update(error.headers)
    if isinstance(error, (errors.QueueFull, errors.RateLimited)):
        headers["retry-after"] = str(error.retry_after)
    elif reply.status == 503:
        headers["retry-after"] = str(RETRY_SECONDS)
    request_id = request.scope.get("state", {}).get("request_id", "unknown")
    if reply.status >= 500:
        logger.error("%s: %s in request %s", reply.slug, type(error).__name__, request_id)
    if not isinstance(error, (errors.PrecisError, HTTPException, ClientDisconnect)):
        # Frames only: the message of an unforeseen exception may quote a text.
        logger.error("%s", "".join(traceback.format_tb(error.__traceback__)))
    if metrics := getattr(request.app.state, "metrics", None):
        metrics.errors.labels(kind=reply.slug).inc()
    headers["x-error-message"] = header_safe(detail)
    headers["x-error-type"] = reply.error_type
    body = Problem(
        type=f"/problems/{reply.slug}",
        title=reply.title,
        status=reply.status,
        detail=detail,
        instance=f"urn:request:{request_id}",
        error=detail,
        error_type=reply.error_type,
        errors=found[:MAX_ERRORS],
    )
    # Escaped ASCII: a key with a lone surrogate stands in its own error's pointer.
    return Response(
        json.dumps(body.model_dump(), allow_nan=False),
        reply.status,
        headers,
        media_type=media_type(request.headers.get("accept", "")),
    )


def media_type(accept: str) -> str:
    """`application/json` for those who ask for it and not for problems; else what RFC 9457 says."""
    asked = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return "application/json" if "application/json" in asked and PROBLEM_JSON not in asked else PROBLEM_JSON


PROBLEM_JSON = "application/problem+json"


def header_safe(text: str) -> str:
    """Printable ASCII on one line."""
    return re.sub(r"[^\x20-\x7e]+", "?", text)[:MAX_HEADER]


def _http_detail(error: HTTPException, request: Request) -> str:
    if error.status_code == 404:
        return "There is nothing at this path; POST /summarize, or see /docs."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"This path takes {allowed}."
    return str(error.detail)
