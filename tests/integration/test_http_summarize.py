"""`POST /summarize` and `POST /tokenize`: shapes, parameters, headers, cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.engine import GenerationParams
from app.errors import EngineFailed, EngineStopped
from tests.service import LIMIT, serving

pytestmark = pytest.mark.anyio
LONG = "a b c d e f g h i j k l m"  # 15 tokens


async def test_one_text_and_several_in_order() -> None:
    async with serving() as service:
        reply = await service.summarize("hello world")
        assert reply.status_code == 200
        assert reply.json() == [
            {
                "summary_text": "hello world",
                "score": -0.5,
                "finish_reason": "eos",
                "input_tokens": 4,
                "source_tokens": 4,
                "output_tokens": 3,
                "truncated": False,
            }
        ]
        for name in ("x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"):
            assert reply.headers[name].isdecimal()
        assert reply.headers["x-compute-tokens"] == "4"
        several = await service.client.post("/", json={"text": ["hello", "world", "the"]})
        assert [item["summary_text"] for item in several.json()] == ["hello", "world", "the"]


async def test_parameters_reach_the_engine_from_both_places() -> None:
    async with serving() as service:
        await service.summarize("a", num_beams=2, generate_parameters={"max_length": 9, "early_stopping": "never"})
        assert service.engine.submitted[0][1] == GenerationParams(
            num_beams=2, max_new_tokens=8, min_new_tokens=5, early_stopping="never"
        )


async def test_tokens_and_alternatives_on_request() -> None:
    async with serving() as service:
        item = (await service.summarize("hello", **{"return": ["tokens"]})).json()[0]
        assert item["token_ids"] == list(service.engine.submitted[0][0][1:])
        assert "alternatives" not in item
        item = (await service.summarize("hello", num_return_sequences=2)).json()[0]
        assert [alternative["score"] for alternative in item["alternatives"]] == [-0.5, -1.5]
        assert "token_ids" not in item
        assert len((await service.summarize("hello", **{"return": ["alternatives"]})).json()[0]["alternatives"]) == 1


async def test_cuts_are_reported() -> None:
    async with serving() as service:
        reply = await service.summarize(["a", LONG], truncation="longest_first")
        assert reply.headers["x-hf-warning"] == f"truncation; inputs[1] cut to {LIMIT} tokens"
        assert [(i["input_tokens"], i["source_tokens"], i["truncated"]) for i in reply.json()] == [
            (3, 3, False),
            (LIMIT, 15, True),
        ]
        head = await service.summarize(LONG, overflow="truncate_head")
        assert head.json()[0]["summary_text"] == "d e f g h i j k l m"


async def test_one_text_over_the_limit_refuses_the_batch_before_any_work() -> None:
    async with serving() as service:
        reply = await service.summarize([LONG, "a", LONG])
        assert reply.status_code == 413
        assert [error["pointer"] for error in reply.json()["errors"]] == ["/inputs/0", "/inputs/2"]
        assert service.engine.submitted == []
        single = await service.client.post("/summarize", json={"text": LONG})
        assert single.json()["errors"][0]["pointer"] == "/text"
        assert single.json()["detail"].startswith("text is 15 tokens; the limit is 12")


async def test_tokenize() -> None:
    async with serving() as service:
        reply = await service.client.post("/tokenize", json={"inputs": ["a", LONG]})
        assert reply.json() == [
            {"tokens": 3, "limit": 12, "excess": 0, "cut_at_char": None},
            {"tokens": 15, "limit": 12, "excess": 3, "cut_at_char": 19},
        ]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/inputs"),
        ({"inputs": "a", "text": "a"}, "/text"),
        ({"inputs": []}, "/inputs"),
        ({"inputs": 3}, "/inputs"),
        ({"inputs": ["a", 3]}, "/inputs/1"),
        ({"inputs": ["a", " "]}, "/inputs/1"),
        ({"inputs": " "}, "/inputs"),
        ({"inputs": "a", "a/b~": 1}, "/a~1b~0"),
        ({"inputs": "a", "parameters": []}, "/parameters"),
        ({"inputs": "a", "parameters": {"do_sample": True}}, "/parameters/do_sample"),
        ({"inputs": "a", "parameters": {"generate_parameters": {"top_p": 1}}}, "/parameters/generate_parameters/top_p"),
        ({"inputs": "a", "parameters": {"num_beams": "4"}}, "/parameters/num_beams"),
        ({"inputs": "a", "parameters": {"num_beams": True}}, "/parameters/num_beams"),
        ({"inputs": "a", "parameters": {"early_stopping": "no"}}, "/parameters/early_stopping"),
        ({"inputs": "a", "parameters": {"return": ["logits"]}}, "/parameters/return/0"),
        # Beyond these, 32-bit arithmetic overflows.
        ({"inputs": "a", "parameters": {"length_penalty": 1e300}}, "/parameters/length_penalty"),
        ({"inputs": "a", "parameters": {"repetition_penalty": 1e-300}}, "/parameters/repetition_penalty"),
        ({"inputs": "a", "parameters": {"no_repeat_ngram_size": 10**30}}, "/parameters/no_repeat_ngram_size"),
        ({"inputs": "a", "parameters": {"overflow": "chunk"}}, "/parameters/overflow"),
        ({"inputs": "a", "parameters": {"truncation": "x"}}, "/parameters/truncation"),
        ([], ""),
    ],
)
async def test_schema_errors_point_at_the_place(body: Any, pointer: str) -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", json=body)
        assert reply.status_code == 422
        assert reply.json()["errors"][0]["pointer"] == pointer


async def test_a_caller_that_leaves_frees_its_texts() -> None:
    async with serving() as service:
        service.engine.open.clear()
        left = asyncio.Event()
        body = iter([{"type": "http.request", "body": b'{"inputs": ["hello", "world"]}', "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            try:
                return next(body)
            except StopIteration:
                await left.wait()
                return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/summarize",
            "raw_path": b"/summarize",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        request = asyncio.create_task(service.app(scope, receive, send))
        while len(service.engine.submitted) < 2:
            await asyncio.sleep(0.001)
        left.set()
        await request
        assert service.engine.cancelled == 2
        admission = service.app.state.runtime.model.summarizer.admission
        assert admission.tokens == 0
        assert "precis_disconnects_total 1.0" in (await service.client.get("/metrics")).text


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with serving(max_queue_tokens=10) as service:
        service.engine.open.clear()
        first = asyncio.create_task(service.summarize(["a", "b", "c"]))
        while len(service.engine.submitted) < 3:
            await asyncio.sleep(0.001)
        assert "precis_admitted_tokens 9.0" in (await service.client.get("/metrics")).text
        refused = await service.summarize("hello")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        service.engine.open.set()
        assert (await first).status_code == 200
        assert (await service.summarize("hello")).status_code == 200
        assert (await service.summarize(["a", "b", "c", "d"])).status_code == 413


@pytest.mark.parametrize(
    ("error", "status"), [(EngineFailed("NaN"), 500), (EngineStopped("gone"), 503), (KeyError("a secret text"), 500)]
)
async def test_engine_errors(error: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as service:
        service.engine.error = error
        reply = await service.summarize(["hello", "world"])
        assert reply.status_code == status
        assert reply.json()["instance"] == f"urn:request:{reply.headers['x-request-id']}"
        assert "secret" not in reply.text + caplog.text
