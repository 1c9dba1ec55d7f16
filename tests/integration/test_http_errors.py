"""One error body for every client, whatever goes wrong before the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.service import serving

pytestmark = pytest.mark.anyio
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"inputs": NaN}',
        b'{"inputs": "a", "parameters": {"length_penalty": -Infinity}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"inputs": ' + b"9" * 5000 + b"}",
    ],
)
async def test_not_json(body: bytes) -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", content=body, headers=JSON)
        assert reply.status_code == 400
        assert reply.headers["content-type"] == "application/problem+json"
        problem = reply.json()
        assert problem["type"] == "/problems/malformed-json"
        assert problem["error"] == problem["detail"] == reply.headers["x-error-message"]


async def test_infinity_by_overflow_and_lone_surrogates_are_json_but_wrong() -> None:
    async with serving() as service:
        for body in (
            b'{"inputs": "a", "parameters": {"length_penalty": 1e999}}',
            b'{"inputs": "\\ud800"}',
            b'{"\\ud800": 1}',
        ):
            reply = await service.client.post("/summarize", content=body, headers=JSON)
            assert reply.status_code == 422, body


async def test_other_media_types() -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", data={"inputs": "a"})
        assert reply.status_code == 415
        for media in ("application/json; charset=utf-8", "application/vnd.api+json"):
            reply = await service.client.post("/summarize", content=b'{"inputs": "a"}', headers={"content-type": media})
            assert reply.status_code == 200


async def test_a_compressed_body_is_refused_before_it_is_read() -> None:
    async with serving() as service:
        for encoding, status in (("gzip", 415), ("GZIP, identity", 415), ("br", 415), ("identity", 200)):
            headers = {**JSON, "content-encoding": encoding}
            reply = await service.client.post("/summarize", content=b'{"inputs": "a"}', headers=headers)
            assert reply.status_code == status
            assert ("without Content-Encoding" in reply.text) == (status == 415)


async def test_the_body_limit_counts_bytes_with_and_without_a_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 10

    async with serving(max_body_bytes=100) as service:
        for content in (b" " * 101, chunks()):
            reply = await service.client.post("/summarize", content=content, headers=JSON)
            assert reply.status_code == 413
            assert reply.json()["type"] == "/problems/body-too-large"
        assert (await service.summarize("a")).status_code == 200


async def test_a_body_that_does_not_come() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    async with serving(body_timeout=0.05) as service:
        reply = await service.client.post("/summarize", content=slow(), headers=JSON)
        assert reply.status_code == 408


async def test_batch_size() -> None:
    async with serving(max_batch_size=2) as service:
        reply = await service.summarize(["a", "b", "c"])
        assert reply.status_code == 413
        assert reply.json()["detail"] == "The request has 3 texts; the limit is 2."
        assert reply.json()["errors"][0]["pointer"] == "/inputs"


async def test_paths_and_methods() -> None:
    async with serving() as service:
        assert (await service.client.get("/nowhere")).json()["status"] == 404
        reply = await service.client.get("/summarize")
        assert reply.json()["status"] == 405
        assert reply.headers["allow"] == "POST"


async def test_accept_decides_the_media_type() -> None:
    async with serving() as service:
        for accept, media in (
            ("application/json", "application/json"),
            ("text/html, application/json;q=0.9", "application/json"),
            ("*/*", "application/problem+json"),
            ("application/json, application/problem+json", "application/problem+json"),
        ):
            reply = await service.client.get("/nowhere", headers={"accept": accept})
            assert reply.headers["content-type"] == media


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-1", True), ("a" * 128, True), ("a" * 129, False), ("a\tb", False), ("", False)]
)
async def test_request_ids(sent: str, kept: bool) -> None:
    async with serving() as service:
        reply = await service.client.get("/nowhere", headers={"x-request-id": sent})
        assert (reply.headers["x-request-id"] == sent) is kept
        assert reply.json()["instance"].endswith(reply.headers["x-request-id"])


async def test_cors_allows_authorization() -> None:
    async with serving() as service:
        reply = await service.client.options(
            "/summarize",
            headers={
                "origin": "https://a.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type",
            },
        )
        assert reply.status_code == 200
        assert "authorization" in reply.headers["access-control-allow-headers"].lower()
        failed = await service.client.get("/nowhere", headers={"origin": "https://a.example"})
        assert failed.headers["access-control-allow-origin"] == "*"
        assert "x-error-message" in failed.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize("accept", ["text/html", "application/xml, image/*", "application/json;q=0", "text/csv;q=0.5"])
async def test_who_accepts_neither_json_nor_events_is_told(accept: str) -> None:
    async with serving() as service:
        for path in ("/summarize", "/tokenize", "/score"):
            reply = await service.client.post(path, json={"inputs": "a"}, headers={"accept": accept})
            assert reply.status_code == 406
            assert reply.json()["type"] == "/problems/not-acceptable"


@pytest.mark.parametrize("accept", ["*/*", "text/html, */*;q=0.1", "application/json; charset=utf-8", "APPLICATION/*"])
async def test_who_accepts_json_among_others_gets_it(accept: str) -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", json={"inputs": "a"}, headers={"accept": accept})
        assert reply.headers["content-type"] == "application/json"
