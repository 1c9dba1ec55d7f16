"""What every route that summarises does between its own request and its own reply: one place, whatever the protocol.

Knows the request's headers and the summarizer. Does not know how a route's body looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from app.engine import Priority
from app.errors import InvalidRequest
from app.exception_handlers import header_safe
from app.middleware import milliseconds
from app.routes.request import runtime_of, unless_disconnected
from app.schemas import Parameters, Summary
from app.summarizer import Terms, Timings
from app.tokenization import Pointer, label


@dataclass(frozen=True)
class Answer:
    """Summaries in the order of the texts, and headers for the reply: timings, and a warning where a text was cut."""

    summaries: list[Summary]
    headers: dict[str, str]

    def items(self) -> list[dict[str, object]]:
        """The summaries as JSON, without what nobody asked for."""
        return [summary.model_dump(exclude_unset=True) for summary in self.summaries]


async def answer(request: Request, texts: Sequence[str], pointer: Pointer, parameters: Parameters | None) -> Answer:
    """Summarise for a caller, for as long as the caller is there. Call it after the body was read.

    Args:
        pointer: where each text stands in the caller's body, for errors.

    Raises:
        PrecisError: any of the tree's; exception_handlers.py makes replies of them.
        ClientDisconnect: the caller left, and the work was dropped.
    """
    model = runtime_of(request).require_model()
    options, terms = model.summarizer.options(parameters), terms_of(request)
    work = model.summarizer.summarize(texts, options, pointer, terms)
    summaries, timings = await unless_disconnected(request, work)
    headers = _timing_headers(timings)
    cut = ", ".join(label(pointer(index)) for index, summary in enumerate(summaries) if summary.truncated)
    if cut:
        headers["x-hf-warning"] = header_safe(f"truncation; {cut} cut to {model.limits.max_input_tokens} tokens")
    return Answer(summaries, headers)


def terms_of(request: Request) -> Terms:
    """What the headers ask of the service: `X-Request-Timeout` in seconds, `X-Priority`.

    Raises:
        InvalidRequest: a header says something else.
    """
    longest = runtime_of(request).settings.max_request_timeout
    priority = request.headers.get("x-priority", Priority.INTERACTIVE.name).upper()
    if priority not in Priority.__members__:
        raise _invalid_header("x-priority", "X-Priority is neither interactive nor batch.")
    try:
        timeout = float(request.headers.get("x-request-timeout", longest))
    except ValueError:
        timeout = 0.0
    if not 0 < timeout < math.inf:  # NaN is not, either
        raise _invalid_header("x-request-timeout", "X-Request-Timeout is not a number of seconds above 0.")
    return Terms(min(timeout, longest), Priority[priority])


def _invalid_header(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, [{"header": name, "message": message}])


def _timing_headers(timings: Timings) -> dict[str, str]:
    return {
        "x-compute-time": milliseconds(timings.tokenization + timings.inference),
        "x-compute-tokens": str(timings.tokens),
        "x-tokenization-time": milliseconds(timings.tokenization),
        "x-queue-time": milliseconds(timings.queue),
        "x-inference-time": milliseconds(timings.inference),
    }
