"""The bridge to asyncio: answers, cancellation, draining, failure and death of the thread."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.engine import AsyncEngine, Engine, EngineConfig, GenerationParams, async_engine
from app.engine.sequence import Sequence
from app.errors import DeadlineExceeded, EngineFailed, EngineStopped
from tests.tiny import random_sources

PARAMS = GenerationParams(num_beams=2, max_new_tokens=20)
LONG = GenerationParams(num_beams=8, max_new_tokens=40, min_new_tokens=40)


@pytest.fixture
def engine(tiny_folder: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(Engine.from_folder(tiny_folder, EngineConfig(max_num_seqs=4)))
    engine.start()
    yield engine
    asyncio.run(engine.stop(timeout=10))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def slow_down(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 20 ms and more, so that a long text is still running when a busy machine looks for it."""
    step = engine.engine.step

    def slow() -> list[Sequence]:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine.engine, "step", slow)


def test_concurrent_texts_get_what_the_engine_gives_them(engine: AsyncEngine, tiny_folder: Path) -> None:
    sources = random_sources(12, seed=2)
    expected = Engine.from_folder(tiny_folder, EngineConfig(max_num_seqs=4)).generate(sources, PARAMS)

    async def all_at_once() -> list[tuple[int, ...]]:
        await until(lambda: engine.ready)
        outputs = await asyncio.gather(*(engine.submit(ids, PARAMS) for ids in sources))
        return [output.hypotheses[0].token_ids for output in outputs]

    assert asyncio.run(all_at_once()) == [output.hypotheses[0].token_ids for output in expected]


def test_a_cancelled_task_frees_its_slot(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        await until(lambda: engine.ready)
        slow_down(engine, monkeypatch)
        task = asyncio.create_task(engine.submit(random_sources(1, seed=1)[0], LONG))
        await until(lambda: engine.stats().running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not engine.stats().running)
        assert engine.stats().cancelled == 1

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_stop_answers_what_was_taken_and_refuses_what_comes_later(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        await until(lambda: engine.ready)
        tasks = [asyncio.create_task(engine.submit(ids, LONG)) for ids in random_sources(6, seed=1)]
        await asyncio.sleep(0)
        await engine.stop(timeout=10)
        assert all(len(output.hypotheses[0].token_ids) == 40 for output in await asyncio.gather(*tasks))
        assert not engine.alive
        with pytest.raises(EngineStopped):
            await engine.submit([1, 2], PARAMS)

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.parametrize(
    ("params", "at_least"),
    [
        (GenerationParams(max_new_tokens=30), 24),
        (GenerationParams(num_beams=4, max_new_tokens=30), 1),
        (GenerationParams(num_beams=4, max_new_tokens=30, early_stopping=True, length_penalty=-1.0), 1),
        # Groups that must differ seldom share a beginning.
        (GenerationParams(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, max_new_tokens=30), 0),
        (GenerationParams(do_sample=True, num_return_sequences=3, max_new_tokens=30, seed=1), 24),
    ],
)
def test_what_is_told_as_certain_stays_and_grows_to_the_result(
    engine: AsyncEngine, params: GenerationParams, at_least: int
) -> None:
    async def one(ids: list[int]) -> int:
        told: list[tuple[int, ...]] = []
        output = await engine.submit(ids, params, on_certain=told.append)
        for shorter, longer in itertools.pairwise([*told, output.hypotheses[0].token_ids]):
            assert longer[: len(shorter)] == shorter
        assert all(len(a) < len(b) for a, b in itertools.pairwise(told))
        return len(told)

    async def scenario() -> None:
        await until(lambda: engine.ready)
        counts = await asyncio.gather(*(one(ids) for ids in random_sources(12, seed=5)))
        assert sum(counts) >= at_least  # it does not wait for the end

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_what_cannot_be_done_in_time_is_not_begun(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        await until(lambda: engine.ready)
        with pytest.raises(DeadlineExceeded):
            await engine.submit([1, 5, 2], PARAMS, deadline=time.monotonic() - 0.01)
        assert (await engine.submit([1, 5, 2], PARAMS, deadline=time.monotonic() + 60)).hypotheses

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_text_beyond_the_limits_fails_alone(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        await until(lambda: engine.ready)
        with pytest.raises(EngineFailed, match="65 is over the limit of 64"):
            await engine.submit([1] * 65, PARAMS)
        assert (await engine.submit([1, 5, 2], PARAMS)).hypotheses

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_the_heart_beats_when_idle(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        await until(lambda: engine.ready)
        for _ in range(2):
            await until(lambda: engine.heartbeat_age() > 0.1)
            await until(lambda: engine.heartbeat_age() < 0.1)

    asyncio.run(asyncio.wait_for(scenario(), 10))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_death_of_the_thread_is_seen_and_leaves_nobody_waiting(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        await until(lambda: engine.ready)
        slow_down(engine, monkeypatch)
        waiting = asyncio.create_task(engine.submit(random_sources(1, seed=1)[0], LONG))
        await until(lambda: engine.stats().running)
        monkeypatch.setattr(engine.engine, "step", None)  # the loop itself breaks, not a step
        with pytest.raises(EngineStopped, match="the engine thread died: TypeError"):
            await waiting
        await until(lambda: not engine.alive)
        assert not engine.ready
        with pytest.raises(EngineStopped):
            await engine.submit([1, 2], PARAMS)

    asyncio.run(asyncio.wait_for(scenario(), 10))


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_unused_memory_goes_back_when_work_ends_and_now_and_then_while_it_goes_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    engine = AsyncEngine(Engine.from_folder(tiny_folder, EngineConfig(max_num_seqs=4)))
    at_work: list[bool] = []  # whenever memory goes back
    monkeypatch.setattr(async_engine, "give_back_unused", lambda: at_work.append(engine.engine.scheduler.has_work))
    monkeypatch.setattr(async_engine, "GIVE_BACK_SECONDS", seconds)

    async def scenario() -> None:
        engine.start()
        await until(lambda: at_work)  # what loading and warming up have left
        assert not at_work.pop()
        await engine.submit(random_sources(1, seed=1)[0], LONG)
        await until(lambda: False in at_work)
        assert (True in at_work) == (seconds == 0)
        if seconds:
            for _ in range(2):  # idle waits
                await until(lambda: engine.heartbeat_age() > async_engine.IDLE_SECONDS / 2)
                await until(lambda: engine.heartbeat_age() < async_engine.IDLE_SECONDS / 2)
            assert at_work == [False]
        await engine.stop(timeout=10)

    asyncio.run(asyncio.wait_for(scenario(), 20))
