"""The client against the server's own routes: what one sends the other reads, and errors keep their names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from app.client import (
    AsyncSummarizer,
    ClientError,
    DeadlineExceeded,
    Delta,
    EngineFailed,
    InputTooLong,
    InvalidRequest,
    QueueFull,
    RetryPolicy,
    StreamedSummary,
    Summary,
)
from app.client.errors import from_reply
from app.engine import Priority
from app.errors import EngineFailed as ServersEngineFailed
from tests.integration.test_clients import listening
from tests.service import LIMIT, Service, serving

pytestmark = pytest.mark.anyio

LONG = "hello " * LIMIT


@asynccontextmanager
async def connected(**settings: Any) -> AsyncIterator[tuple[AsyncSummarizer, Service]]:
    async with serving(**settings) as service:
        transport = httpx.ASGITransport(service.app)
        once = RetryPolicy(max_retries=0)
        async with AsyncSummarizer("http://test", transport=transport, retry=once) as summarizer:
            yield summarizer, service


async def test_many_texts_are_split_as_the_server_wants() -> None:
    texts = ["hello world", "un", "the", "hello", "world"]
    async with connected(max_batch_size=2, max_body_bytes=100) as (summarizer, service):
        summaries = await summarizer.summarize_many(texts)
        each = [summary async for summary in summarizer.summarize_each(texts)]
    assert [summary.summary_text for summary in summaries] == texts
    assert each == summaries
    assert len(service.engine.submitted) == 2 * len(texts)


async def test_options_reach_the_engine_and_what_was_asked_for_comes_back() -> None:
    async with connected() as (summarizer, service):
        summary = await summarizer.summarize(
            "hello world", num_beams=3, num_return_sequences=2, length_penalty=0.5, with_tokens=True
        )
        cut = await summarizer.summarize(LONG, overflow="truncate_tail")
    params = service.engine.submitted[0][1]
    assert (params.num_beams, params.num_return_sequences, params.length_penalty) == (3, 2, 0.5)
    assert summary.token_ids is not None
    assert len(summary.token_ids) == summary.output_tokens
    assert summary.alternatives is not None
    assert len(summary.alternatives) == 2
    assert (cut.truncated, cut.input_tokens) == (True, LIMIT)


async def test_every_bad_text_is_named_by_the_callers_number_and_the_others_are_summarised() -> None:
    texts = ["hello", LONG, "", "world", "a\ud800", LONG, "the"]
    async with connected(max_batch_size=3) as (summarizer, _):
        with pytest.raises(ClientError):
            await summarizer.summarize_many(texts)
        answers = await summarizer.summarize_many(texts, return_errors=True)
    kinds = [type(answer) for answer in answers]
    assert kinds == [Summary, InputTooLong, InvalidRequest, Summary, InvalidRequest, InputTooLong, Summary]
    for index in (1, 2, 4, 5):
        error = answers[index]
        assert isinstance(error, ClientError)
        assert error.indices == (index,)
        assert error.request_id
        assert f"inputs[{index}]" in str(error) or f"/inputs/{index}" in str(error)
    assert isinstance(answers[5], ClientError)
    assert answers[5].errors[0]["cut_at_char"] == len("hello " * (LIMIT - 2)) - 1


async def test_a_wrong_option_is_named() -> None:
    async with connected() as (summarizer, _):
        with pytest.raises(InvalidRequest) as caught:
            await summarizer.summarize("hello", num_beams=99)
        with pytest.raises(InvalidRequest, match="penalty_alpha"):
            await summarizer.summarize("hello", penalty_alpha=0.6)  # type: ignore[call-arg]
    assert caught.value.errors[0]["pointer"] == "/parameters/generate_parameters/num_beams"


async def test_a_full_queue_and_a_failed_text_have_their_names() -> None:
    async with connected(max_queue_tokens=LIMIT) as (summarizer, service):
        service.engine.open.clear()
        waiting = asyncio.create_task(summarizer.summarize("hello " * (LIMIT - 3)))
        while not service.engine.submitted:
            await asyncio.sleep(0.01)
        with pytest.raises(QueueFull) as caught:
            await summarizer.summarize("hello world")
        service.engine.open.set()
        await waiting
        service.engine.error = ServersEngineFailed("The text could not be finished.")
        with pytest.raises(EngineFailed, match="could not be finished"):
            await summarizer.summarize("hello")
    assert caught.value.retry_after is not None


async def test_tokens_info_and_health() -> None:
    async with connected(max_batch_size=2) as (summarizer, service):
        assert (await summarizer.tokenize(LONG)).excess == 2
        assert [count.tokens for count in await summarizer.tokenize_many(["hello", "the un", "un"])] == [3, 4, 3]
        info = await summarizer.info()
        assert (info.model_id, info.limits.max_batch_size) == ("fake", 2)
        assert (await summarizer.health()).status == "ok"
        service.engine.age = 1e6
        assert (await summarizer.health()).status == "failed"


async def test_a_streams_pieces_are_the_summary() -> None:
    async with connected() as (summarizer, _):
        *deltas, last = [part async for part in summarizer.stream("hello world")]
    assert isinstance(last, Summary)
    assert last.summary_text == "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == "hello world"


async def test_several_streams_are_told_apart_by_the_callers_numbers() -> None:
    texts = ["hello world", "un", "the world"]
    async with connected(max_batch_size=2) as (summarizer, _):
        found = [part async for part in summarizer.stream_many(texts)]
        with pytest.raises(InputTooLong) as caught:
            [part async for part in summarizer.stream_many([*texts, LONG])]
    for index, text in enumerate(texts):
        parts = [part for part in found if part.index == index]
        *deltas, last = parts
        assert isinstance(last, StreamedSummary)
        assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == last.summary_text == text
    assert caught.value.indices == (3,)


async def test_the_priority_reaches_the_engine() -> None:
    async with connected() as (summarizer, service):
        await summarizer.summarize("hello")
        await summarizer.summarize("hello", priority="batch")
        await summarizer.summarize_many(["hello"], priority="interactive")
        [part async for part in summarizer.stream("hello", priority="batch")]
        with pytest.raises(InvalidRequest, match="X-Priority"):
            await summarizer.summarize("hello", priority="low")  # type: ignore[arg-type]
    expected = [Priority.INTERACTIVE, Priority.BATCH, Priority.INTERACTIVE, Priority.BATCH]
    assert [priority for priority, _ in service.engine.terms] == expected


async def test_connections_are_used_again_by_plain_calls_and_by_streams(caplog: pytest.LogCaptureFixture) -> None:
    def connections() -> int:
        return sum(record.getMessage().startswith("connect_tcp.complete") for record in caplog.records)

    with caplog.at_level(logging.DEBUG, "httpcore.connection"), listening() as server:
        async with AsyncSummarizer(server.url, max_concurrency=2) as summarizer:
            for _ in range(3):
                await summarizer.summarize("hello")
                assert len([part async for part in summarizer.stream("hello world")]) > 1
            with pytest.raises(InputTooLong):
                await summarizer.summarize(LONG)
            assert connections() == 1
            await asyncio.gather(*(summarizer.summarize("hello") for _ in range(20)))
            assert connections() == 2


async def test_what_fails_before_a_stream_begins_has_its_name() -> None:
    async with connected() as (summarizer, _):
        with pytest.raises(InputTooLong):
            await anext(summarizer.stream(LONG))


async def test_the_server_heeds_the_deadline_it_is_told() -> None:
    async with connected() as (summarizer, service):
        service.engine.open.clear()
        reply = await service.client.post(
            "/summarize", json={"inputs": "hello"}, headers={"x-request-timeout": "0.050"}
        )
        with pytest.raises(DeadlineExceeded):
            await summarizer.summarize("hello", timeout=0.05)
        service.engine.open.set()
    assert isinstance(from_reply(reply.status_code, reply.headers, reply.content), DeadlineExceeded)
