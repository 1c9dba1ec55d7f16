"""The queueing model where theory knows the answer, and what must hold of routers and of the autoscaler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.queueing import (
    Autoscaling,
    RandomRouter,
    Replica,
    Request,
    RequestsRouter,
    Router,
    ServeRouter,
    TokensRouter,
    interpolated,
    simulate,
)


def poisson(count: int, rate: float, works: Sequence[float], seed: int = 1) -> list[Request]:
    generator = np.random.default_rng(seed)
    ats = np.cumsum(generator.exponential(1 / rate, count)).tolist()
    chosen = generator.choice(np.array(works), count).tolist()
    return [Request(at, [work], 1.0) for at, work in zip(ats, chosen, strict=True)]


@pytest.fixture
def router() -> RandomRouter:
    return RandomRouter(np.random.default_rng(0))


def test_one_slot_waits_as_pollaczek_and_khinchine_say(router: RandomRouter) -> None:
    works, rate = [0.5, 1.5], 0.6
    outcome = simulate(poisson(60_000, rate, works), 1, 1, lambda running: 1.0, router)
    mean, square = float(np.mean(works)), float(np.mean(np.square(works)))
    expected = mean + rate * square / (2 * (1 - rate * mean))
    assert np.mean(outcome.latencies()) == pytest.approx(expected, rel=0.05)


def test_shared_speed_takes_as_long_as_processor_sharing(router: RandomRouter) -> None:
    outcome = simulate(poisson(60_000, 0.6, [0.5, 1.5]), 1, 10**6, lambda running: 1.0, router)
    assert np.mean(outcome.latencies()) == pytest.approx(1.0 / (1 - 0.6), rel=0.06)


def test_a_batch_that_is_faster_together_answers_more(router: RandomRouter) -> None:
    requests = [Request(0.0, [1.0] * 8, 8.0)]
    outcome = simulate(requests, 1, 8, interpolated({1: 1.0, 8: 4.0}), router)
    assert outcome.latencies() == [pytest.approx(2.0)]


def test_texts_beyond_the_slots_wait(router: RandomRouter) -> None:
    outcome = simulate([Request(0.0, [1.0] * 3, 3.0)], 1, 2, lambda running: float(running), router)
    assert outcome.latencies() == [pytest.approx(2.0)]


def test_cores_that_are_shared_slow_both(router: RandomRouter) -> None:
    requests = [Request(0.0, [1.0], 1.0), Request(0.0, [1.0], 1.0)]
    replicas = iter([0, 1])

    class Alternating(RandomRouter):
        def choose(self, request: Request, replicas_: Sequence[Replica], ready: Sequence[int], now: float) -> int:
            return next(replicas)

    alternating = Alternating(np.random.default_rng(0))
    outcome = simulate(requests, 2, 1, lambda running: 1.0, alternating, lambda running: 1.0 if 0 in running else 0.5)
    assert outcome.latencies() == [pytest.approx(2.0), pytest.approx(2.0)]


@pytest.mark.parametrize("routers", [1, 3])
def test_every_request_is_answered_once_and_nothing_is_left(routers: int) -> None:
    requests = poisson(2000, 30.0, [0.1, 0.2])
    router = TokensRouter(np.random.default_rng(2), routers)
    outcome = simulate(requests, 5, 4, interpolated({1: 1.0, 4: 2.0}), router)
    assert len(outcome.requests) == 2000
    assert all(math.isfinite(request.seconds) and request.seconds > 0 for request in outcome.requests)
    assert not router._router_of
    assert all(abs(tokens) < 1e-6 for own in router._own for tokens in own.values())


def test_tokens_see_what_requests_do_not() -> None:
    generator = np.random.default_rng(5)
    ats = np.cumsum(generator.exponential(1 / 12.0, 20_000)).tolist()
    sizes = np.where(generator.random(20_000) < 0.05, 32, 1).tolist()

    def p95(router: Router) -> float:
        requests = [Request(at, [0.2] * size, float(size)) for at, size in zip(ats, sizes, strict=True)]
        outcome = simulate(requests, 10, 16, interpolated({1: 1.0, 16: 1.5}), router)
        return float(np.quantile([r.seconds for r in outcome.requests if len(r.works) == 1], 0.95))

    routers = (RandomRouter, ServeRouter, RequestsRouter, TokensRouter)
    by_chance, by_serve, by_requests, by_tokens = (p95(kind(np.random.default_rng(3))) for kind in routers)
    assert by_tokens < by_requests < by_chance
    # With one proxy, what Serve knows is exact.
    assert by_serve == pytest.approx(by_requests, rel=0.1)


def test_a_proxy_of_many_knows_less() -> None:
    def p95(router: Router) -> float:
        outcome = simulate(poisson(20_000, 90.0, [0.5, 1.5]), 100, 4, lambda running: 1.0, router)
        return float(np.quantile(outcome.latencies(), 0.95))

    alone, many = (p95(ServeRouter(np.random.default_rng(3), routers)) for routers in (1, 20))
    assert alone < many


def test_replicas_come_with_the_load_and_go_after_it() -> None:
    requests = poisson(3000, 10.0, [0.5])
    plan = Autoscaling(1, 20, 4.0, upscale_delay=2.0, downscale_delay=20.0, startup=5.0)
    last = requests[-1].at
    trickle = [Request(last + 3.0 * n, [0.5], 1.0) for n in range(1, 60)]
    outcome = simulate(
        [*requests, *trickle],
        1,
        16,
        lambda running: 1.0,
        RequestsRouter(np.random.default_rng(3)),
        autoscaling=plan,
    )
    most = max(size for _, size in outcome.sizes)
    assert 5 <= most <= 20
    assert outcome.sizes[-1][1] == 1
    assert outcome.replica_seconds() < most * outcome.ended
    assert len(outcome.requests) == len(requests) + len(trickle)
