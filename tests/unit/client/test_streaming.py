"""Streams are read whole however they are cut, and an end before the summary is an error."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.client.connection import deadline_after
from app.client.errors import BadReply, ClientError, DeadlineExceeded, EngineFailed, NoReply
from app.client.models import Delta, StreamedSummary, Summary
from app.client.streaming import parts
from tests.unit.client.stub import item, problem, stream

pytestmark = pytest.mark.anyio

# Line ends for str.splitlines, and not for the format.
TEXT = "ein\u2028größerer\x85Text\r\nmit\x1cZeilen 🦜"
EVENTS: tuple[tuple[str, Any], ...] = (
    ("delta", {"index": 0, "text": TEXT}),
    ("result", item(TEXT) | {"index": 0}),
    ("done", {}),
)


async def read(
    response: httpx.Response, deadline: float = math.inf, attempt_timeout: float = 5, count: int = 1
) -> list[Delta | StreamedSummary]:
    return [part async for part in parts(response, count, deadline, attempt_timeout)]


class Pieces(httpx.AsyncByteStream):
    """A body that comes in pieces; after them it ends, breaks off or hangs."""

    def __init__(self, pieces: list[bytes], end: Exception | None = None, hang: bool = False) -> None:
        self.pieces, self.end, self.hang = pieces, end, hang
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
        if self.hang:
            await asyncio.sleep(60)
        if self.end is not None:
            raise self.end

    async def aclose(self) -> None:
        self.closed = True


def streamed(body: Pieces) -> httpx.Response:
    return httpx.Response(200, stream=body, headers={"content-type": "text/event-stream"})


@given(st.integers(1, 40), st.sampled_from(["\n", "\r\n", "\r"]))
async def test_the_pieces_are_the_same_wherever_the_bytes_are_cut(size: int, end: str) -> None:
    content = stream(*EVENTS, comment=": still here\n\n").text.replace("\n", end).encode()
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    body = Pieces(pieces)
    delta, summary = await read(streamed(body))
    assert isinstance(delta, Delta)
    assert delta.text == TEXT
    assert isinstance(summary, Summary)
    assert summary.summary_text == TEXT.upper()
    assert body.closed


async def test_events_of_a_newer_server_are_passed_over() -> None:
    found = await read(stream(("progress", {"percent": 3}), *EVENTS))
    assert [type(part) for part in found] == [Delta, StreamedSummary]


async def test_a_server_that_does_not_stream_gives_the_summary_alone() -> None:
    (summary,) = await read(httpx.Response(200, json=[item("text")]))
    assert isinstance(summary, Summary)


async def test_several_texts_are_told_apart_by_their_index_and_given_as_they_come() -> None:
    events: tuple[tuple[str, Any], ...] = (
        ("delta", {"index": 1, "text": "B "}),
        ("delta", {"index": 0, "text": "A"}),
        ("result", item("b") | {"index": 1}),
        ("result", item("a") | {"index": 0}),
        ("done", {}),
    )
    found = await read(stream(*events), count=2)
    assert [(type(part), part.index) for part in found] == [
        (Delta, 1),
        (Delta, 0),
        (StreamedSummary, 1),
        (StreamedSummary, 0),
    ]


async def test_a_server_that_does_not_stream_gives_every_summary_with_its_index() -> None:
    found = await read(httpx.Response(200, json=[item("a"), item("b")]), count=2)
    assert [(part.index, vars(part)["summary_text"]) for part in found] == [(0, "A"), (1, "B")]


async def test_a_summary_that_is_missing_among_several_is_an_error() -> None:
    with pytest.raises(NoReply):
        await read(stream(*EVENTS), count=2)
    with pytest.raises(BadReply):
        await read(httpx.Response(200, json=[item("a")]), count=2)


@pytest.mark.parametrize(
    "last", [("delta", {"index": 0, "text": "A"}), EVENTS[1], ("delta", {"index": 7, "text": "A"})]
)
async def test_an_event_of_a_text_that_is_done_or_unknown_is_an_error(last: tuple[str, Any]) -> None:
    with pytest.raises(BadReply):
        await read(stream(*EVENTS[:2], last), count=2)


async def test_the_error_event_is_raised_by_its_name() -> None:
    with pytest.raises(EngineFailed) as caught:
        await read(stream(EVENTS[0], ("error", problem(500, "generation-failed", detail="Failed.").json())))
    assert (str(caught.value), caught.value.status) == ("Failed.", 500)


@pytest.mark.parametrize(
    "response",
    [
        stream(EVENTS[0]),
        stream(EVENTS[0], ("done", {})),
        stream(),
        streamed(Pieces([stream(EVENTS[0]).content], end=httpx.ReadError("reset"))),
        streamed(Pieces([stream(EVENTS[0]).content], hang=True)),
    ],
    ids=["end", "done", "nothing", "reset", "hang"],
)
async def test_an_end_before_the_summary_is_an_error(response: httpx.Response) -> None:
    with pytest.raises(NoReply):
        await read(response, attempt_timeout=0.05)


@pytest.mark.parametrize("end", [None, httpx.ReadError("reset")])
async def test_a_summary_that_came_counts_though_the_end_is_lost(end: Exception | None) -> None:
    found = await read(streamed(Pieces([stream(*EVENTS[:2]).content], end)))
    assert isinstance(found[-1], Summary)


async def test_a_summary_that_came_counts_though_the_end_is_late() -> None:
    found = await read(streamed(Pieces([stream(*EVENTS[:2]).content], hang=True)), deadline_after(0.1))
    assert isinstance(found[-1], Summary)


async def test_the_deadline_holds_between_events() -> None:
    body = Pieces([stream(EVENTS[0]).content], hang=True)
    with pytest.raises(DeadlineExceeded):
        await read(streamed(body), deadline_after(0.1))
    assert body.closed


@pytest.mark.parametrize(
    "response",
    [
        stream(("result", {"summary_text": "secret"})),
        stream(("delta", ["secret"])),
        httpx.Response(200, text="<html>secret"),
        httpx.Response(200, json=[]),
    ],
)
async def test_what_is_no_summary_is_an_error_that_does_not_quote_it(response: httpx.Response) -> None:
    with pytest.raises(BadReply) as caught:
        await read(response)
    error: BaseException | None = caught.value
    assert isinstance(error, ClientError)
    assert "secret" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
