"""What Serve asks a replica, answered from a fake engine at the seam."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.errors import InvalidSetting
from deploy.ray import replica as module
from deploy.ray.autoscaling import STAT
from deploy.ray.replica import EngineUnhealthy, Replica
from tests.service import FakeEngine, load_fake


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def replica(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Replica:
    monkeypatch.setattr(module, "load_model", lambda settings, metrics: load_fake(settings, metrics, engine))
    return Replica({"allow_anonymous": True, "max_heartbeat_age": 30})


def running(replica: Replica) -> Any:
    app = replica.__serve_build_asgi_app__()
    return app.router.lifespan_context(app)


def test_a_hung_engine_fails_the_health_check_and_says_by_how_much(replica: Replica, engine: FakeEngine) -> None:
    async def ask() -> None:
        async with running(replica):
            await replica.check_health()
            engine.age = 31.0
            with pytest.raises(EngineUnhealthy, match=r"lives and last moved 31\.0 s ago; the limit is 30 s"):
                await replica.check_health()

    asyncio.run(ask())


def test_a_dead_engine_fails_the_health_check_and_gets_no_requests(replica: Replica, engine: FakeEngine) -> None:
    async def ask() -> None:
        async with running(replica):
            assert (await replica.record_routing_stats())["ready"] is True
            engine.alive = False
            assert (await replica.record_routing_stats())["ready"] is False
            with pytest.raises(EngineUnhealthy, match="is dead"):
                await replica.check_health()

    asyncio.run(ask())


def test_the_autoscaler_counts_texts_that_run_or_wait(replica: Replica) -> None:
    async def ask() -> None:
        async with running(replica):
            assert await replica.record_autoscaling_stats() == {STAT: 5.0}  # the fake's 3 and 2

    asyncio.run(ask())


def test_reports_to_the_router_are_numbered(replica: Replica) -> None:
    async def ask() -> list[int]:
        async with running(replica):
            return [(await replica.record_routing_stats())["report"] for _ in range(3)]

    assert asyncio.run(ask()) == [0, 1, 2]


def test_a_replica_without_keys_does_not_start_unless_somebody_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRECIS_ALLOW_ANONYMOUS", raising=False)  # the cluster's, where there is one
    with pytest.raises(InvalidSetting, match="PRECIS_API_KEYS"):
        Replica({})
