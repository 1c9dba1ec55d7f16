"""Server-sent events, deadlines and priorities, over ASGI with a fake engine."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

import pytest

from app.engine import Priority
from app.errors import EngineFailed
from tests.service import Service, serving

pytestmark = pytest.mark.anyio
EVENTS = {"accept": "text/event-stream"}


def parse_events(body: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in body.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines["event"], json.loads(lines["data"])))
    return found


async def streamed(service: Service, inputs: Any, **parameters: Any) -> list[tuple[str, dict[str, Any]]]:
    reply = await service.client.post("/summarize", json={"inputs": inputs, "parameters": parameters}, headers=EVENTS)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    return parse_events(reply.text)


@pytest.mark.parametrize("options", [{}, {"clean_up_tokenization_spaces": True}, {"num_return_sequences": 2}])
async def test_the_parts_of_each_text_are_its_plain_summary(options: dict[str, Any]) -> None:
    async with serving() as service:
        texts = ["hello unaffable world", "the world , hello !"]
        plain = (await service.summarize(texts, **options)).json()
        events = await streamed(service, texts, **options)
        for index, item in enumerate(plain):
            parts = [data["text"] for name, data in events if name == "delta" and data["index"] == index]
            assert "".join(parts) == item["summary_text"]
            (result,) = [data for name, data in events if name == "result" and data["index"] == index]
            assert result == {"index": index, **item}
            assert len(parts) > 1 or options
        assert events[-1] == ("done", {})


async def test_the_body_may_ask_for_events_and_has_the_last_word() -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", json={"inputs": "hello", "stream": True})
        assert parse_events(reply.text)[-1] == ("done", {})
        reply = await service.client.post("/summarize", json={"inputs": "hello", "stream": False}, headers=EVENTS)
        assert reply.json()[0]["summary_text"] == "hello"


@pytest.mark.parametrize(
    ("accept", "events"),
    [
        ("Text/Event-Stream", True),
        ("application/json;q=0.5, text/event-stream;q=0.9", True),
        ("application/json, text/event-stream;q=0", False),
        ("text/*", False),
    ],
)
async def test_the_accept_header_asks_for_events_in_any_case_and_not_by_refusing_them(
    accept: str, events: bool
) -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", json={"inputs": "hello"}, headers={"accept": accept})
        assert reply.headers["content-type"].startswith("text/event-stream" if events else "application/json")


async def test_an_error_before_the_first_event_is_an_error_reply() -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", json={"inputs": "hello " * 30, "stream": True})
        assert reply.status_code == 413
        service.engine.error = EngineFailed("it failed")
        reply = await service.client.post("/summarize", json={"inputs": "hello", "stream": True})
        assert reply.status_code == 500
        assert reply.json()["error"] == "it failed"


async def test_an_error_behind_the_first_event_is_an_event() -> None:
    async with serving() as service:
        service.engine.fail_after_telling = EngineFailed("it failed")
        events = await streamed(service, "hello world hello")
        assert events[0][0] == "delta"
        name, problem = events[-1]
        assert (name, problem["status"], problem["error"]) == ("error", 500, "it failed")


async def test_a_deadline_is_an_error_504_and_gives_everything_back() -> None:
    async with serving() as service:
        service.engine.open.clear()
        reply = await service.client.post("/summarize", json={"inputs": "hello"}, headers={"x-request-timeout": "0.5"})
        assert reply.status_code == 504
        assert reply.json()["detail"] == "The summaries were not done within 0.5 s."
        assert service.engine.cancelled == 1
        assert "precis_admitted_tokens 0.0" in (await service.client.get("/metrics")).text


async def test_headers_say_who_is_first_and_until_when() -> None:
    async with serving(max_request_timeout=20) as service:
        for headers in ({}, {"x-priority": "batch", "x-request-timeout": "5"}, {"x-request-timeout": "100"}):
            assert (await service.client.post("/summarize", json={"inputs": "a"}, headers=headers)).status_code == 200
        priorities = [priority for priority, _ in service.engine.terms]
        assert priorities == [Priority.INTERACTIVE, Priority.BATCH, Priority.INTERACTIVE]
        seconds = [deadline - time.monotonic() for _, deadline in service.engine.terms]
        assert all(math.isclose(a, b, abs_tol=2) for a, b in zip(seconds, (20, 5, 20), strict=True))


@pytest.mark.parametrize(
    "headers",
    [{"x-priority": "first"}, *({"x-request-timeout": value} for value in ("", "soon", "0", "-1", "nan", "inf"))],
)
async def test_a_header_that_says_something_else_is_refused(headers: dict[str, str]) -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", json={"inputs": "hello"}, headers=headers)
        assert reply.status_code == 422
        assert reply.json()["errors"][0]["header"] == next(iter(headers))


async def test_more_requests_than_the_limit_get_429_with_a_time() -> None:
    async with serving(max_queue_requests=2) as service:
        service.engine.open.clear()
        held = [asyncio.create_task(service.summarize("hello")) for _ in range(2)]
        while len(service.engine.submitted) < 2:
            await asyncio.sleep(0)
        reply = await service.summarize("hello")
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        service.engine.open.set()
        assert [(await task).status_code for task in held] == [200, 200]
        assert (await service.summarize("hello")).status_code == 200
