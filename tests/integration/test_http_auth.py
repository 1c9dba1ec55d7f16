"""API keys and rates over HTTP."""

from __future__ import annotations

import logging

import pytest

from tests.service import serving

pytestmark = pytest.mark.anyio
KEY, OTHER = "k" * 16, "m" * 16
KEYS = f"web:{KEY},reports:{OTHER}"
BODY = {"inputs": "hello"}


async def test_without_keys_a_token_is_nobodys_business() -> None:
    async with serving() as service:
        reply = await service.client.post("/summarize", json=BODY, headers={"authorization": "Bearer hf_whatever"})
        assert reply.status_code == 200


async def test_with_keys_everything_but_probes_and_the_contract_needs_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(api_keys=KEYS) as service:
        for path in ("/summarize", "/invocations", "/score", "/tokenize", "/"):
            reply = await service.client.post(path, json=BODY)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["type"] == "/problems/unauthorized"
        for path in ("/info", "/metrics", "/nothing", "/v2"):
            assert (await service.client.get(path)).status_code == 401
        for path in ("/health", "/health/live", "/health/ready", "/ping", "/v2/health/ready", "/openapi.json"):
            assert (await service.client.get(path)).status_code == 200
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": OTHER}):
            assert (await service.client.post("/summarize", json=BODY, headers=headers)).status_code == 200
        wrong = {"x-api-key": KEY + "x"}
        assert (await service.client.post("/summarize", json=BODY, headers=wrong)).status_code == 401
        info = await service.client.get("/info", headers={"x-api-key": KEY})
        assert KEY not in info.text
    assert KEY not in caplog.text
    assert OTHER not in caplog.text


async def test_a_browser_may_ask_what_it_may_send_without_a_key() -> None:
    async with serving(api_keys=KEYS) as service:
        headers = {
            "origin": "https://example.org",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        reply = await service.client.options("/summarize", headers=headers)
        assert reply.status_code == 200
        assert "authorization" in reply.headers["access-control-allow-headers"]


async def test_each_key_has_its_own_rate_and_its_headers() -> None:
    async with serving(api_keys=KEYS, rate_limit="2/minute") as service:
        replies = [await service.client.get("/info", headers={"x-api-key": KEY}) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        assert [reply.headers["ratelimit"].split(";")[1] for reply in replies] == ["r=1", "r=0", "r=0"]
        assert replies[0].headers["ratelimit-policy"] == '"fixed window";"api";q=2;w=60'
        assert 1 <= int(replies[2].headers["retry-after"]) <= 60
        assert replies[2].json()["type"] == "/problems/rate-limited"
        assert (await service.client.get("/info", headers={"x-api-key": OTHER})).status_code == 200
        assert (await service.client.get("/health", headers={"x-api-key": KEY})).status_code == 200
