"""What the router takes for a replica's load, from the requests that Serve's own proxy writes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.proxy_request_response import ASGIProxyRequest

from deploy.ray.routing import BYTES_PER_TOKEN, UNKNOWN_BYTES, EngineQueueRouter, Ledger, tokens


def request(method: str, **headers: str) -> list[Any]:
    """As the proxy sends it to a replica."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/summarize", "headers": raw}

    async def nothing(*_: Any) -> Any:
        raise AssertionError("a router reads no body")

    return [ASGIProxyRequest(scope, nothing, nothing).serialized_replica_arg("proxy")]


def test_a_body_counts_by_its_length() -> None:
    assert tokens(request("POST", content_length="4000")) == 4000 / BYTES_PER_TOKEN


@pytest.mark.parametrize("length", ["", "many", "-1"])
def test_a_body_without_a_length_counts_as_one_of_the_usual(length: str) -> None:
    assert tokens(request("POST", content_length=length)) == UNKNOWN_BYTES / BYTES_PER_TOKEN
    assert tokens(request("POST")) == UNKNOWN_BYTES / BYTES_PER_TOKEN


def test_a_probe_is_no_work() -> None:
    assert tokens(request("GET")) == 0


def test_what_others_sent_is_what_the_engine_reports_beyond_our_own() -> None:
    ledger = Ledger(sent={"a": 300.0})
    ledger.read({"report": 1, "tokens": 1000, "ready": True})
    assert ledger.load == 1000
    del ledger.sent["a"]
    assert ledger.load == 700
    ledger.read({"report": 1, "tokens": 1000, "ready": True})  # the same report again
    assert ledger.load == 700


def test_a_replica_that_has_not_reported_has_what_we_sent() -> None:
    ledger = Ledger(sent={"a": 300.0})
    ledger.read({})
    assert ledger.load == 300


@pytest.fixture
def router() -> EngineQueueRouter:
    """The router's own part; Serve's is in test_replicas.py."""
    router = EngineQueueRouter.__new__(EngineQueueRouter)
    router.initialize_state()
    return router


def choice(router: EngineQueueRouter, *loads: Ledger) -> list[str]:
    replicas = [SimpleNamespace(replica_id=f"r{index}") for index in range(len(loads))]
    router.ledgers = {f"r{index}": ledger for index, ledger in enumerate(loads)}
    context = SimpleNamespace(should_backoff=False)
    ranks = asyncio.run(router.choose_replicas(replicas, SimpleNamespace(routing_context=context)))
    assert context.should_backoff
    return [replica.replica_id for rank in ranks for replica in rank]


def test_the_one_with_less_to_work_off_comes_first(router: EngineQueueRouter) -> None:
    assert choice(router, Ledger(sent={"a": 500.0}), Ledger(others=100.0)) == ["r1", "r0"]


def test_two_are_drawn_of_many_and_every_one_at_times(router: EngineQueueRouter) -> None:
    drawn = [choice(router, *(Ledger(others=float(load)) for load in range(5))) for _ in range(200)]
    assert {len(two) for two in drawn} == {2}
    assert {name for two in drawn for name in two} == {f"r{index}" for index in range(5)}
    assert all(first < second for first, second in drawn)


def test_one_replica_is_drawn_alone(router: EngineQueueRouter) -> None:
    assert choice(router, Ledger(others=9.0)) == ["r0"]


def test_one_that_is_not_ready_comes_last_however_short_its_queue(router: EngineQueueRouter) -> None:
    assert choice(router, Ledger(ready=False), Ledger(others=9000.0)) == ["r1", "r0"]


def test_a_request_counts_until_it_is_completed(router: EngineQueueRouter) -> None:
    router.ledgers = {"r0": Ledger()}
    metadata = SimpleNamespace(internal_request_id="a")
    pending = SimpleNamespace(metadata=metadata, args=request("POST", content_length="800"))
    router.on_request_routed(pending, "r0", None)
    assert router.ledger("r0").load == 200
    router.on_request_completed("r0", "a")
    assert router.ledger("r0").load == 0
    router.on_request_completed("gone", "b")


def test_a_request_that_is_complete_before_it_is_heard_of_leaves_nothing(router: EngineQueueRouter) -> None:
    router.ledgers = {"r0": Ledger(), "r1": Ledger()}
    pending = SimpleNamespace(
        metadata=SimpleNamespace(internal_request_id="a"), args=request("POST", content_length="800")
    )
    router.on_request_completed("r0", "a")
    router.on_request_routed(pending, "r1", None)  # another replica, asked after the first refused
    assert router.ledger("r1").load == 200
    router.on_request_routed(pending, "r0", None)
    assert router.ledger("r0").load == 0
    router.on_request_routed(pending, "r0", None)
    assert router.ledger("r0").load == 200
