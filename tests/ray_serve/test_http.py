"""One replica behind Serve's proxy: the contract is the server's own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.client import AsyncSummarizer, StreamedSummary
from benchmarks.ray_cluster import ServeCluster

Build = Callable[..., Any]
TEXT = "Anna: Are we still on for lunch?\nBen: Could we move it to Friday?"


@pytest.fixture(scope="module")
def url(cluster: ServeCluster, build: Build) -> str:
    # Room for one request of 16 short texts, and no more.
    cluster.deploy(build(1, settings={"max_queue_requests": 1}), 1)
    return cluster.url


def test_a_summary_and_its_headers_come_through(url: str) -> None:
    reply = httpx.post(f"{url}/summarize", json={"inputs": TEXT}, headers={"x-request-id": "mine"}, timeout=30)
    assert reply.status_code == 200
    assert reply.json()[0]["finish_reason"] == "eos"
    assert reply.headers.get_list("x-request-id") == ["mine"]


def test_one_torch_thread_for_one_core(url: str) -> None:
    assert httpx.get(f"{url}/info").json()["settings"]["num_threads"] == 1


def test_a_refusal_comes_through_with_its_problem_and_when_to_come_back(url: str) -> None:
    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            slow = {"inputs": [TEXT] * 16, "parameters": {"generate_parameters": {"min_new_tokens": 60}}}
            return await asyncio.gather(*(client.post(f"{url}/summarize", json=slow) for _ in range(4)))

    replies = asyncio.run(crowd())
    refused = [reply for reply in replies if reply.status_code == 429]
    assert 1 <= len(refused) <= 3
    assert len(refused) + sum(reply.status_code == 200 for reply in replies) == 4
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["type"] == "/problems/queue-full"


def test_a_stream_arrives_in_parts(url: str) -> None:
    async def pieces() -> list[Any]:
        async with AsyncSummarizer(url) as summarizer:
            return [part async for part in summarizer.stream(TEXT, num_beams=1, min_new_tokens=12)]

    *deltas, last = asyncio.run(pieces())
    assert len(deltas) > 1
    assert isinstance(last, StreamedSummary)
    assert "".join(delta.text for delta in deltas) == last.summary_text


def test_a_caller_that_leaves_frees_its_slots(url: str) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            slow = {"inputs": [TEXT] * 16, "parameters": {"generate_parameters": {"min_new_tokens": 120}}}
            asked = asyncio.create_task(client.post(f"{url}/summarize", json=slow, timeout=60))
            async with asyncio.timeout(30):
                while not await metric(client, "precis_running"):
                    assert not asked.done(), "it must be decoding when its caller leaves"
                    await asyncio.sleep(0.02)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            async with asyncio.timeout(30):
                while (await metric(client, "precis_running")) or (await metric(client, "precis_admitted_requests")):
                    await asyncio.sleep(0.1)
            assert await metric(client, "precis_cancelled_total") >= 1

    async def metric(client: httpx.AsyncClient, name: str) -> float:
        lines = (await client.get(f"{url}/metrics", timeout=30)).text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    asyncio.run(leave())


def test_every_replicas_numbers_are_among_rays_metrics(url: str) -> None:
    import ray

    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    names = ("precis_queue_depth", "precis_running", "precis_admitted_tokens", "precis_heartbeat_age_seconds")
    missing, until = set(names), time.monotonic() + 60
    while missing and time.monotonic() < until:
        time.sleep(0.5)
        scraped = "".join(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text for port in ports)
        missing = {name for name in names if f"ray_{name}{{" not in scraped}
    assert missing == set()


def test_an_error_of_the_request_stays_its_own(url: str) -> None:
    reply = httpx.post(f"{url}/summarize", content=b'{"inputs": "cut o', headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert json.loads(reply.content)["type"] == "/problems/malformed-json"
