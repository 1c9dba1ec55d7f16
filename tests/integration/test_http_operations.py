"""Health, info, metrics, OpenAPI, and what is never logged."""

from __future__ import annotations

import logging

import pytest

from app.engine import GenerationParams
from app.schemas import Parameters, SummarizeRequest, Summary
from app.summarizer import RequestLimits, generation_params
from tests.service import serving

pytestmark = pytest.mark.anyio


async def test_ready_follows_the_engine_and_draining_and_live_does_not() -> None:
    async with serving() as service:
        for path in ("/health/ready", "/health", "/summarize/health", "/health/live"):
            assert (await service.client.get(path)).status_code == 200
        service.engine.age = 1000.0
        assert (await service.client.get("/health")).json() == {"status": "failed"}
        service.engine.age = 0.0
        service.app.state.runtime.draining = True
        assert (await service.client.get("/health/ready")).status_code == 503
        assert (await service.summarize("hello")).status_code == 200  # its listeners are open
        service.engine.alive = service.engine.ready = False
        reply = await service.summarize("hello")
        assert reply.status_code == 503
        assert reply.headers["retry-after"].isdecimal()
        assert (await service.client.get("/health/live")).status_code == 200


async def test_info_hides_secrets() -> None:
    async with serving(hub_token="hf_secret") as service:
        reply = await service.client.get("/summarize/info")
        assert "hf_secret" not in reply.text
        info = reply.json()
        assert info["model"] | {"revision": ""} == {
            "name": "fake",
            "version": "1.0",
            "revision": "",
            "verified": True,
            "parameters": 0,
        }
        assert info["limits"]["max_input_tokens"] == 12
        assert info["defaults"]["num_beams"] == 4
        assert "torch" in info["versions"]


async def test_metrics() -> None:
    async with serving() as service:
        await service.summarize("hello world")
        await service.client.request("BREW", "/x")
        text = (await service.client.get("/metrics")).text
        for line in (
            'precis_requests_total{method="POST",route="/summarize",status="200"} 1.0',
            'precis_requests_total{method="other",route="unmatched",status="404"} 1.0',
            'precis_errors_total{kind="not-found"} 1.0',
            "precis_source_tokens_total 4.0",
            "precis_output_tokens_total 3.0",
            "precis_queue_depth 3.0",
            "precis_running 2.0",
            "precis_slots 16.0",
            "precis_engine_tokens_total 11.0",
            "precis_admitted_tokens 0.0",
            "precis_heartbeat_age_seconds 0.0",
        ):
            assert line in text.splitlines()


async def test_openapi_states_bodies_and_errors() -> None:
    async with serving() as service:
        schema = (await service.client.get("/openapi.json")).json()
        operation = schema["paths"]["/summarize"]["post"]
        assert {"200", "400", "413", "415", "422", "429", "500", "503"} <= set(operation["responses"])
        assert "application/problem+json" in operation["responses"]["413"]["content"]
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        limits = RequestLimits(max_batch_size=32, max_num_beams=8, max_output_tokens=127, vocab_size=30522)
        for example in examples.values():
            parameters = SummarizeRequest.model_validate(example["value"]).parameters or Parameters()
            generation_params(parameters, GenerationParams(num_beams=4), limits)
        for example in operation["responses"]["200"]["content"]["application/json"]["examples"].values():
            assert [Summary.model_validate(item) for item in example["value"]]
        body = next(iter(examples.values()))["value"]
        assert (await service.client.post("/tokenize", json=body)).status_code == 200
        assert {"SummarizeRequest", "Parameters", "GenerateParameters", "Problem", "Summary"} <= set(
            schema["components"]["schemas"]
        )
        text = str(schema)
        for name in schema["components"]["schemas"]:
            text = text.replace(f"#/components/schemas/{name}'", "")
        assert "#/" not in text  # every reference leads somewhere


async def test_texts_and_credentials_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as service:
        headers = {"authorization": "Bearer hf_secret"}
        for body in ({"inputs": "unaffable"}, {"inputs": "unaffable " * 20}, {"unaffable": 1}):
            await service.client.post("/summarize?q=unaffable", json=body, headers=headers)
    records = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert any("POST /summarize 413" in line for line in records)
    assert "unaffable" not in "".join(records)
    assert "hf_secret" not in "".join(records)
