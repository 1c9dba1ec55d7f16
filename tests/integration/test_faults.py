"""What the process does about an engine that is gone, with a fake one; `tests/e2e/test_faults.py` kills real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from app.__main__ import Server, _listen
from app.main import create_app
from tests.service import FakeEngine, load_fake, read_settings

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Server, FakeEngine]]:
    """A server that listens, and has ended when the block has."""
    engine = FakeEngine()
    app = create_app(read_settings(), lambda settings, metrics: load_fake(settings, metrics, engine))
    server = Server(uvicorn.Config(app, lifespan="on", log_config=None), app.state.runtime, "http://test")
    serving = asyncio.create_task(server.serve(sockets=[_listen("127.0.0.1", 0)]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield server, engine
    await asyncio.wait_for(serving, 5)


async def test_a_server_without_its_engine_thread_ends_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (server, engine):
        engine.alive = False
    assert server.engine_died
    assert [record.levelname for record in caplog.records if "engine thread is dead" in record.message] == ["CRITICAL"]


async def test_an_engine_that_ends_with_its_server_has_not_died() -> None:
    async with running() as (server, engine):
        assert server.runtime.status() == "ok"
        server.should_exit = True
    assert engine.stopped
    assert not server.engine_died
