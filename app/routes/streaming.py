"""Summaries as server-sent events, each part as soon as no decode step can change it.

`delta` {"index", "text"}, then `result` (the item of the plain reply, with its index) for each text; `done` at the end,
or `error` (the problem body) in its place. What goes wrong before the first event is an error reply as everywhere.
Knows events. Does not know when text is certain.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.sse import format_sse_event
from starlette.responses import Response, StreamingResponse

from app.exception_handlers import problem_response
from app.routes.answer import terms_of
from app.routes.request import accepted_media, runtime_of, unless_disconnected
from app.schemas import Parameters, Summary
from app.tokenization import Pointer

EVENT_STREAM = "text/event-stream"
KEEP_ALIVE_SECONDS = 15.0  # a comment goes out this often, for proxies that close silent connections
KEEP_ALIVE = b": waiting\n\n"

Event = tuple[str, dict[str, Any]]


def wants_stream(request: Request, stream: bool | None) -> bool:
    """Whether the body or the Accept header asks for events; what the body says counts."""
    if stream is not None:
        return stream
    return EVENT_STREAM in accepted_media(request)


async def answer_with_events(
    request: Request, texts: Sequence[str], pointer: Pointer, parameters: Parameters | None
) -> Response:
    """Start the work, and reply when there is a first event. The work ends with the connection.

    Raises:
        PrecisError: nothing was sent yet.
    """
    summarizer = runtime_of(request).require_model().summarizer
    options, terms = summarizer.options(parameters), terms_of(request)
    events: asyncio.Queue[Event | None] = asyncio.Queue()

    def delta(index: int, text: str) -> None:
        events.put_nowait(("delta", {"index": index, "text": text}))

    def result(index: int, summary: Summary) -> None:
        events.put_nowait(("result", {"index": index, **summary.model_dump(exclude_unset=True)}))

    work = asyncio.create_task(summarizer.summarize(texts, options, pointer, terms, delta, result))
    work.add_done_callback(lambda _: events.put_nowait(None))
    try:
        first = await unless_disconnected(request, events.get())
        if first is None:
            work.result()  # it failed before it had anything to say
    except BaseException:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        raise
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_stream(request, first, events, work), headers=headers, media_type=EVENT_STREAM)


async def _stream(
    request: Request, first: Event | None, events: asyncio.Queue[Event | None], work: asyncio.Task[Any]
) -> AsyncIterator[bytes]:
    try:
        event = first
        while event is not None:
            yield _format(*event)
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), KEEP_ALIVE_SECONDS)
                    break
                except TimeoutError:
                    yield KEEP_ALIVE
        yield _end(request, work)
    finally:  # the connection may have closed
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def _end(request: Request, work: asyncio.Task[Any]) -> bytes:
    error = work.exception()
    if error is None:
        return _format("done", {})
    assert isinstance(error, Exception)
    return _format("error", json.loads(bytes(problem_response(request, error).body)))


def _format(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data, ensure_ascii=False, allow_nan=False))
