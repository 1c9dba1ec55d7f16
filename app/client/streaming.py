"""A reply of server-sent events, read into pieces of summaries and the summaries.

Knows the events' names. Does not know how the reply was asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Container
from contextlib import aclosing
from typing import TypeVar

import httpx
from httpx_sse import EventSource
from pydantic import TypeAdapter, ValidationError

from app.client.connection import expect_reply, no_later_than
from app.client.errors import BadReply, DeadlineExceeded, NoReply, from_reply
from app.client.models import Delta, StreamedSummary

M = TypeVar("M", Delta, StreamedSummary)
_SUMMARIES = TypeAdapter(list[StreamedSummary])


async def parts(
    response: httpx.Response, count: int, deadline: float, attempt_timeout: float
) -> AsyncGenerator[Delta | StreamedSummary, None]:
    """Deltas and summaries as they come; from a server that does not stream, the summaries alone. Closes the reply.

    Args:
        count: of the request's texts; each part's `index` is below it, and each text gets one summary.
        deadline: of the whole, in the loop's time.
        attempt_timeout: seconds between two events.

    Raises:
        ClientError: the server's `error` event; NoReply if the stream breaks off before the last summary.
    """
    async with aclosing(response):
        if "text/event-stream" not in response.headers.get("content-type", ""):
            async with no_later_than(deadline), expect_reply(attempt_timeout):
                content = await response.aread()
            for summary in _whole(content, count):
                yield summary
            return
        missing = set(range(count))
        async with aclosing(EventSource(response).aiter_sse()) as events:
            # To the end, though the last `result` is the last that matters: so the connection can be used again.
            while True:
                try:
                    async with no_later_than(deadline), expect_reply(attempt_timeout):
                        event = await anext(events, None)
                except (NoReply, DeadlineExceeded):
                    if missing:
                        raise
                    return
                if event is None:
                    break
                if event.event == "delta":
                    yield _read(Delta, event.data, missing)
                elif event.event == "result":
                    summary = _read(StreamedSummary, event.data, missing)
                    missing.discard(summary.index)
                    yield summary
                elif event.event == "error":
                    raise from_reply(response.status_code, response.headers, event.data)
        if missing:
            raise NoReply("The stream ended before the last summary.")


def _read(model: type[M], data: str, missing: Container[int]) -> M:
    try:
        part = model.model_validate_json(data)
    except ValidationError:  # not chained: it quotes the summary
        raise BadReply(f"An event is not a {model.__name__}.") from None
    if part.index not in missing:
        raise BadReply(f"An event is of text {part.index}, which has its summary or was not sent.")
    return part


def _whole(content: bytes, count: int) -> list[StreamedSummary]:
    try:
        summaries = _SUMMARIES.validate_json(content)
    except ValidationError:
        raise BadReply("The reply is not a list of summaries.") from None
    if len(summaries) != count:
        raise BadReply(f"{count} texts got {len(summaries)} answers.")
    return [summary.model_copy(update={"index": index}) for index, summary in enumerate(summaries)]
