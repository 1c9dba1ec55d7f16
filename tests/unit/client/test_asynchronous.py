"""Many texts get their answers in order, in batches that the server takes; calls use its routes."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing

import httpx
import pytest

from app.client import (
    AsyncSummarizer,
    BadReply,
    ClientError,
    DeadlineExceeded,
    Delta,
    InputTooLong,
    InvalidRequest,
    NoReply,
    Priority,
    StreamedSummary,
    Summary,
)
from tests.unit.client.stub import AT_ONCE, Stub, item, problem, stream

pytestmark = pytest.mark.anyio

TEXTS = [f"text {i}" for i in range(10)]
SUMMARIES = [text.upper() for text in TEXTS]


def client(stub: Stub, **settings: float) -> AsyncSummarizer:
    return AsyncSummarizer("http://stub", retry=AT_ONCE, transport=stub, **settings)  # type: ignore[arg-type]


async def test_one_text_is_one_request() -> None:
    stub = Stub()
    async with client(stub) as summarizer:
        summary = await summarizer.summarize("a text", num_beams=2, overflow="truncate_tail")
    assert isinstance(summary, Summary)
    assert summary.summary_text == "A TEXT"
    (request,) = stub.requests
    assert json.loads(request.content) == {
        "inputs": ["a text"],
        "parameters": {"overflow": "truncate_tail", "generate_parameters": {"num_beams": 2}},
    }


async def test_many_are_split_by_the_limits_of_info_which_is_asked_once() -> None:
    stub = Stub(max_batch_size=4)
    async with client(stub) as summarizer:
        for _ in range(2):
            summaries = await summarizer.summarize_many(TEXTS)
            assert [summary.summary_text for summary in summaries] == SUMMARIES
    assert sorted(map(len, stub.batches)) == [2, 2, 4, 4, 4, 4]
    assert [request.url.path for request in stub.requests].count("/info") == 1


async def test_no_texts_are_no_request() -> None:
    stub = Stub()
    async with client(stub) as summarizer:
        assert await summarizer.summarize_many([]) == []
        assert [summary async for summary in summarizer.summarize_each([])] == []
    assert stub.requests == []


async def test_each_comes_in_order_though_a_later_batch_is_answered_first() -> None:
    stub = Stub(httpx.ReadError("reset"), max_batch_size=1)
    async with client(stub) as summarizer:
        found = [summary.summary_text async for summary in summarizer.summarize_each(TEXTS)]
    assert found == SUMMARIES
    assert stub.batches[0] != ["text 0"]


async def test_the_first_comes_before_the_last_is_asked() -> None:
    stub = Stub(max_batch_size=1)
    stub.seconds = 0.01
    async with client(stub, max_concurrency=1) as summarizer, aclosing(summarizer.summarize_each(TEXTS)) as found:
        assert (await anext(found)).summary_text == "TEXT 0"
        assert len(stub.batches) < len(TEXTS)


async def test_leaving_early_drops_the_rest() -> None:
    stub = Stub(max_batch_size=1)
    stub.seconds = 0.02
    many = TEXTS * 10  # a second's work, of which one stays
    async with client(stub, max_concurrency=2) as summarizer:
        async with aclosing(summarizer.summarize_each(many)) as found:
            await anext(found)
        asked = len(stub.requests)
        await asyncio.sleep(0.1)
    assert len(stub.requests) == asked < len(many)


async def test_an_error_names_the_callers_text_and_ends_the_others() -> None:
    stub = Stub(max_batch_size=2)
    stub.bad = {"text 5"}
    stub.seconds = 0.01
    async with client(stub, max_concurrency=1) as summarizer:
        with pytest.raises(InputTooLong, match=r"inputs\[5\] is too long") as caught:
            await summarizer.summarize_many(TEXTS)
    assert caught.value.indices == (5,)
    assert caught.value.errors == [{"index": 5, "pointer": "/inputs/5", "message": "inputs[5] is too long."}]
    assert ["text 8", "text 9"] not in stub.batches


async def test_each_gives_what_is_before_an_error() -> None:
    stub = Stub(max_batch_size=2)
    stub.bad = {"text 5"}
    async with client(stub) as summarizer:
        answers = summarizer.summarize_each(TEXTS)
        assert [(await anext(answers)).summary_text for _ in range(4)] == SUMMARIES[:4]
        with pytest.raises(InputTooLong):
            await anext(answers)


async def test_with_return_errors_bad_texts_are_errors_in_their_places_and_nothing_is_asked_twice() -> None:
    stub = Stub(max_batch_size=4)
    stub.bad, stub.failing = {"text 1", "text 9"}, {"text 6"}
    async with client(stub) as summarizer:
        answers = await summarizer.summarize_many(TEXTS, return_errors=True)
        each = [answer async for answer in summarizer.summarize_each(TEXTS, return_errors=True)]
    for found in (answers, each):
        shown = [answer.indices if isinstance(answer, ClientError) else answer.summary_text for answer in found]
        assert shown == [*SUMMARIES[:1], (1,), *SUMMARIES[2:6], (6,), *SUMMARIES[7:9], (9,)]


async def test_with_return_errors_a_wrong_option_is_still_raised() -> None:
    stub = Stub(problem(422, "invalid-request", [{"pointer": "/parameters/generate_parameters/num_beams"}]))
    async with client(stub) as summarizer:
        with pytest.raises(InvalidRequest):
            await summarizer.summarize_many(TEXTS[:2], return_errors=True, num_beams=0)


async def test_with_return_errors_the_deadline_loses_no_summary() -> None:
    class Stuck(Stub):
        """Hangs from the fourth text on."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.seconds = 60 if len(self.batches) == done else 0
            return await super().handle_async_request(request)

    done = 3
    stub = Stuck(max_batch_size=1)
    async with client(stub, max_concurrency=1) as summarizer:
        answers = await summarizer.summarize_many(TEXTS, return_errors=True, timeout=1)
    kinds = [type(answer) for answer in answers]
    assert kinds == [Summary] * done + [DeadlineExceeded] * (len(TEXTS) - done)
    assert [answer.indices for answer in answers[done:] if isinstance(answer, ClientError)] == [
        (i,) for i in range(done, len(TEXTS))
    ]


async def test_a_call_has_the_clients_timeout_unless_it_has_its_own() -> None:
    stub = Stub()
    stub.seconds = 0.2
    async with client(stub, timeout=0.05) as summarizer:
        with pytest.raises(DeadlineExceeded):
            await summarizer.summarize("a")
        assert (await summarizer.summarize("a", timeout=5)).summary_text == "A"


async def test_limits_that_have_shrunk_since_they_were_asked_lose_nothing() -> None:
    stub = Stub(*(problem(413, "batch-too-large", [{"pointer": "/inputs"}]) for _ in range(3)), max_batch_size=10)
    async with client(stub) as summarizer:
        summaries = await summarizer.summarize_many(TEXTS)
    assert [summary.summary_text for summary in summaries] == SUMMARIES
    assert sorted(text for batch in stub.batches for text in batch) == TEXTS


async def test_progress_counts_every_text() -> None:
    counts: list[int] = []
    async with client(Stub()) as summarizer:
        await summarizer.summarize_many(TEXTS, progress=counts.append)
    assert sum(counts) == len(TEXTS)


async def test_one_text_is_not_taken_for_a_list_of_letters() -> None:
    async with client(Stub()) as summarizer:
        with pytest.raises(TypeError):
            await summarizer.summarize_many("a text")


@pytest.mark.parametrize("body", [b"<html>secret", b'[{"summary_text": "secret"}]', b"[]", b'[{}, {"a": "secret"}]'])
async def test_a_reply_that_is_none_is_an_error_that_does_not_quote_it(body: bytes) -> None:
    async with client(Stub(httpx.Response(200, content=body))) as summarizer:
        with pytest.raises(BadReply) as caught:
            await summarizer.summarize("a")
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


async def test_half_a_character_reaches_the_server_which_names_the_text() -> None:
    stub = Stub()
    stub.bad = {"a\ud800"}
    async with client(stub) as summarizer:
        answers = await summarizer.summarize_many(["b", "a\ud800", "c"], return_errors=True)
    assert [type(answer) for answer in answers] == [Summary, InputTooLong, Summary]


async def test_a_stream_gives_pieces_and_then_the_summary() -> None:
    stub = Stub(
        problem(429, "queue-full", retry_after="0"),
        stream(
            ("delta", {"index": 0, "text": "A "}), ("delta", {"index": 0, "text": "TEXT"}), ("result", item("a text"))
        ),
    )
    async with client(stub) as summarizer:
        found = [part async for part in summarizer.stream("a text", num_beams=1)]
    assert [part.text for part in found if isinstance(part, Delta)] == ["A ", "TEXT"]
    assert isinstance(found[-1], Summary)
    assert [request.headers["accept"] for request in stub.requests] == ["text/event-stream"] * 2


async def test_a_stream_is_not_begun_again_after_its_first_piece() -> None:
    stub = Stub(stream(("delta", {"index": 0, "text": "A "})))
    async with client(stub) as summarizer:
        parts = summarizer.stream("a text")
        assert isinstance(await anext(parts), Delta)
        with pytest.raises(NoReply):
            await anext(parts)
    assert len(stub.requests) == 1


async def test_streamed_texts_have_the_callers_numbers_in_batches_that_the_server_takes() -> None:
    stub = Stub(
        stream(
            ("delta", {"index": 1, "text": "TEXT"}),
            ("result", item(TEXTS[1]) | {"index": 1}),
            ("result", item(TEXTS[0]) | {"index": 0}),
            ("done", {}),
        ),
        stream(("delta", {"index": 0, "text": "TEXT"}), ("result", item(TEXTS[2]) | {"index": 0}), ("done", {})),
        max_batch_size=2,
    )
    async with client(stub) as summarizer:
        found = [part async for part in summarizer.stream_many(TEXTS[:3], num_beams=1)]
        assert [part async for part in summarizer.stream_many([])] == []
    assert [part.index for part in found if isinstance(part, Delta)] == [1, 2]
    summaries = {part.index: part.summary_text for part in found if isinstance(part, StreamedSummary)}
    assert summaries == dict(enumerate(SUMMARIES[:3]))
    bodies = [json.loads(request.content) for request in stub.requests if request.url.path == "/summarize"]
    assert [body["inputs"] for body in bodies] == [TEXTS[:2], TEXTS[2:3]]


async def test_an_error_among_streamed_texts_names_the_callers_number() -> None:
    done = stream(*(("result", item(text) | {"index": index}) for index, text in enumerate(TEXTS[:2])))
    stub = Stub(done, max_batch_size=2)
    stub.bad = {TEXTS[3]}
    async with client(stub) as summarizer:
        parts = summarizer.stream_many(TEXTS)
        assert [(await anext(parts)).index for _ in range(2)] == [0, 1]
        with pytest.raises(InputTooLong, match=r"inputs\[3\] is too long") as caught:
            await anext(parts)
    assert caught.value.indices == (3,)
    assert stub.batches == [TEXTS[2:4]]


@pytest.mark.parametrize("priority", ["interactive", "batch", None])
async def test_the_priority_is_sent_with_every_call_that_summarises(priority: Priority | None) -> None:
    stub = Stub(stream(("result", item("a"))), stream(("result", item("a"))))
    async with client(stub) as summarizer:
        [_ async for _ in summarizer.stream("a", priority=priority)]
        [_ async for _ in summarizer.stream_many(["a"], priority=priority)]
        await summarizer.summarize("a", priority=priority)
        await summarizer.summarize_many(TEXTS, priority=priority)
        [_ async for _ in summarizer.summarize_each(TEXTS, priority=priority)]
        await summarizer.tokenize("a")
    sent = [(request.url.path, request.headers.get("x-priority")) for request in stub.requests]
    assert {named for path, named in sent if path == "/summarize"} == {priority}
    assert {named for path, named in sent if path != "/summarize"} == {None}


async def test_tokens_are_counted_in_batches_too() -> None:
    stub = Stub(max_batch_size=4)
    async with client(stub) as summarizer:
        assert (await summarizer.tokenize("abc")).tokens == 3
        assert [count.tokens for count in await summarizer.tokenize_many(["a", "bb"] * 5)] == [1, 2] * 5
    assert {request.url.path for request in stub.requests} == {"/tokenize", "/info"}
    assert json.loads(stub.requests[0].content) == {"inputs": ["abc"]}


async def test_info_says_what_is_served() -> None:
    async with client(Stub()) as summarizer:
        info = await summarizer.info()
    assert (info.model_id, info.limits.max_batch_size, info.defaults) == ("stub", 4, {"num_beams": 4})


@pytest.mark.parametrize(("status", "word"), [(200, "ok"), (503, "starting"), (503, "draining")])
async def test_health_is_an_answer_even_when_it_is_no(status: int, word: str) -> None:
    stub = Stub(httpx.Response(status, json={"status": word}))
    async with client(stub) as summarizer:
        assert (await summarizer.health()).status == word
    assert len(stub.requests) == 1


async def test_health_without_an_answer_is_an_error_at_once() -> None:
    stub = Stub(httpx.ConnectError("refused"), httpx.Response(502, text="bad gateway"))
    async with client(stub) as summarizer:
        with pytest.raises(NoReply):
            await summarizer.health()
        with pytest.raises(ClientError, match="502"):
            await summarizer.health()


async def test_every_call_has_a_deadline() -> None:
    stub = Stub()
    stub.seconds = 60
    async with client(stub, timeout=0.05) as summarizer:
        for call in (
            lambda: summarizer.summarize("a"),
            lambda: summarizer.summarize_many(["a"]),
            lambda: anext(summarizer.summarize_each(["a"])),
            lambda: anext(summarizer.stream("a")),
            lambda: anext(summarizer.stream_many(["a"])),
            lambda: summarizer.tokenize("a"),
            lambda: summarizer.tokenize_many(["a"]),
            summarizer.info,
            summarizer.health,
        ):
            with pytest.raises(DeadlineExceeded):
                await call()


async def test_the_key_comes_from_the_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECIS_API_KEY", "sk-environment\n")
    for key, sent in ((None, "Bearer sk-environment"), ("sk-given", "Bearer sk-given"), ("", None)):
        stub = Stub()
        async with AsyncSummarizer("http://stub", api_key=key, transport=stub) as summarizer:
            assert repr(summarizer) == "AsyncSummarizer(URL('http://stub'))"
            await summarizer.summarize("a")
        assert stub.requests[0].headers.get("authorization") == sent


async def test_a_password_in_the_url_is_not_shown() -> None:
    async with AsyncSummarizer("http://user:password@stub", transport=Stub()) as summarizer:
        assert "password" not in repr(summarizer)


async def test_no_text_summary_or_key_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    stub = Stub(httpx.ReadError("reset"), problem(503, "not-ready"), stream(("result", item("a private text"))))
    with caplog.at_level(logging.DEBUG):
        async with AsyncSummarizer("http://stub", api_key="sk-x", transport=stub, retry=AT_ONCE) as summarizer:
            [_ async for _ in summarizer.stream("a private text")]
            await summarizer.summarize_many(["a private text"] * 9, return_errors=True)
    assert caplog.records
    assert all(word not in caplog.text.lower() for word in ("private", "sk-x"))
