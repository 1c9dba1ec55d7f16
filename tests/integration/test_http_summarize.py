"""`POST /summarize` and `POST /tokenize`: shapes, parameters, headers, cancellation."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from app.engine import GenerationParams
from app.errors import EngineFailed, EngineStopped
from tests.service import LIMIT, VOCAB_SIZE, serving

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


async def test_every_option_of_the_engine_can_be_given() -> None:
    values: dict[str, Any] = {
        "num_beams": 1,
        "num_return_sequences": 2,
        "max_new_tokens": 20,
        "min_new_tokens": 2,
        "length_penalty": -1,
        "early_stopping": True,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3,
        "repetition_penalty": 1.5,
        "bad_words_ids": [[7], [8, 9]],
        "suppress_tokens": [10, 11],
        "begin_suppress_tokens": [12],
        "forced_bos_token_id": 13,
        "forced_eos_token_id": 3,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1,
        "seed": 2**63 - 1,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
    }
    async with serving() as service:
        reply = await service.summarize("a", generate_parameters=values)
        assert reply.status_code == 200
        assert len(reply.json()[0]["alternatives"]) == 2
        assert json.loads(json.dumps(dataclasses.asdict(service.engine.submitted[0][1]))) == values


async def test_tokens_and_alternatives_on_request() -> None:
    async with serving() as service:
        item = (await service.summarize("hello", **{"return": ["tokens"]})).json()[0]
        assert item["token_ids"] == list(service.engine.submitted[0][0][1:])
        assert item["token_logprobs"] == [-0.5, -0.25]
        assert "alternatives" not in item
        item = (await service.summarize("hello", num_return_sequences=2)).json()[0]
        assert [alternative["score"] for alternative in item["alternatives"]] == [-0.5, -1.5]
        assert {"token_ids", "token_logprobs"}.isdisjoint([*item, *item["alternatives"][1]])
        item = (await service.summarize("hello", num_return_sequences=2, **{"return": ["tokens"]})).json()[0]
        assert [alternative["token_logprobs"] for alternative in item["alternatives"]] == [[-0.5, -0.25], [-1.5]]
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
        ({"inputs": "a", "parameters": {"min_p": 0.1}}, "/parameters/min_p"),
        ({"inputs": "a", "parameters": {"generate_parameters": {"top_p": 2}}}, "/parameters/generate_parameters/top_p"),
        ({"inputs": "a", "parameters": {"num_beams": "4"}}, "/parameters/num_beams"),
        ({"inputs": "a", "parameters": {"num_beams": True}}, "/parameters/num_beams"),
        ({"inputs": "a", "parameters": {"early_stopping": "no"}}, "/parameters/early_stopping"),
        ({"inputs": "a", "parameters": {"return": ["logits"]}}, "/parameters/return/0"),
        # Beyond these, 32-bit arithmetic overflows.
        ({"inputs": "a", "parameters": {"length_penalty": 1e300}}, "/parameters/length_penalty"),
        ({"inputs": "a", "parameters": {"repetition_penalty": 1e-300}}, "/parameters/repetition_penalty"),
        ({"inputs": "a", "parameters": {"no_repeat_ngram_size": 10**30}}, "/parameters/no_repeat_ngram_size"),
        ({"inputs": "a", "parameters": {"top_k": 10**30}}, "/parameters/top_k"),
        ({"inputs": "a", "parameters": {"temperature": 0}}, "/parameters/temperature"),
        ({"inputs": "a", "parameters": {"temperature": 1e-300}}, "/parameters/temperature"),
        ({"inputs": "a", "parameters": {"top_p": 0}}, "/parameters/top_p"),
        ({"inputs": "a", "parameters": {"diversity_penalty": -1}}, "/parameters/diversity_penalty"),
        ({"inputs": "a", "parameters": {"num_beam_groups": 0}}, "/parameters/num_beam_groups"),
        ({"inputs": "a", "parameters": {"seed": 2**63}}, "/parameters/seed"),
        ({"inputs": "a", "parameters": {"seed": -1}}, "/parameters/seed"),
        ({"inputs": "a", "parameters": {"do_sample": 1}}, "/parameters/do_sample"),
        ({"inputs": "a", "parameters": {"early_stopping": 1}}, "/parameters/early_stopping"),
        ({"inputs": "a", "parameters": {"early_stopping": 0.0}}, "/parameters/early_stopping"),
        ({"inputs": "a", "parameters": {"forced_bos_token_id": -1}}, "/parameters/forced_bos_token_id"),
        ({"inputs": "a", "parameters": {"suppress_tokens": [3, -1]}}, "/parameters/suppress_tokens/1"),
        ({"inputs": "a", "parameters": {"suppress_tokens": [3, VOCAB_SIZE]}}, "/parameters/suppress_tokens/1"),
        ({"inputs": "a", "parameters": {"suppress_tokens": [3] * 257}}, "/parameters/suppress_tokens"),
        ({"inputs": "a", "parameters": {"begin_suppress_tokens": [3] * 257}}, "/parameters/begin_suppress_tokens"),
        ({"inputs": "a", "parameters": {"bad_words_ids": [3]}}, "/parameters/bad_words_ids/0"),
        ({"inputs": "a", "parameters": {"bad_words_ids": [[3], []]}}, "/parameters/bad_words_ids/1"),
        ({"inputs": "a", "parameters": {"bad_words_ids": [[3] * 9]}}, "/parameters/bad_words_ids/0"),
        ({"inputs": "a", "parameters": {"bad_words_ids": [[3]] * 65}}, "/parameters/bad_words_ids"),
        ({"inputs": "a", "parameters": {"bad_words_ids": [[3], [3, VOCAB_SIZE]]}}, "/parameters/bad_words_ids/1/1"),
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
