"""Every metric, declared once, in base units and without labels that callers could fill.

Knows names and meanings. Does not know when something is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class EngineDistribution(Protocol):
    """Values that an engine observed: one count for each bound, and one for what is above them all."""

    @property
    def bounds(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def counts(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def total(self) -> float: ...  # noqa: D102


class EngineNumbers(Protocol):
    """What an engine says of itself."""

    @property
    def waiting(self) -> int: ...  # noqa: D102
    @property
    def running(self) -> int: ...  # noqa: D102
    @property
    def slots(self) -> int: ...  # noqa: D102
    @property
    def cancelled(self) -> int: ...  # noqa: D102
    @property
    def late_waiting(self) -> int: ...  # noqa: D102
    @property
    def late_running(self) -> int: ...  # noqa: D102
    @property
    def encode_seconds(self) -> EngineDistribution: ...  # noqa: D102
    @property
    def step_seconds(self) -> EngineDistribution: ...  # noqa: D102
    @property
    def step_texts(self) -> EngineDistribution: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102


class Metrics:
    """One registry with everything in it; one instance for each application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "precis_requests", "HTTP requests answered", ["method", "route", "status"], registry=registry
        )
        self.request_duration = Histogram(
            "precis_request_duration_seconds",
            "From the first byte of a request to the last of its reply",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.errors = Counter("precis_errors", "Requests answered with an error", ["kind"], registry=registry)
        self.disconnects = Counter("precis_disconnects", "Callers that left before their reply", registry=registry)
        self.texts = Counter("precis_texts", "Texts summarised", registry=registry)
        self.texts_truncated = Counter("precis_texts_truncated", "Texts that were cut to the limit", registry=registry)
        self.source_tokens = Counter("precis_source_tokens", "Source tokens encoded", registry=registry)
        self.output_tokens = Counter("precis_output_tokens", "Tokens of the best hypotheses", registry=registry)
        self.queue_duration = Histogram(
            "precis_queue_duration_seconds", "A text's wait for a slot", buckets=_SECONDS, registry=registry
        )
        self.inference_duration = Histogram(
            "precis_inference_duration_seconds", "A text's encoding and decoding", buckets=_SECONDS, registry=registry
        )
        self.admitted_tokens = Gauge(
            "precis_admitted_tokens", "Source tokens of texts admitted and not finished", registry=registry
        )
        self.admitted_requests = Gauge(
            "precis_admitted_requests", "Requests being answered, waiting ones included", registry=registry
        )
        self.service_rate = Gauge(
            "precis_service_rate_tokens_per_second",
            "Source tokens of texts finished, over the last minute; what Retry-After is computed from",
            registry=registry,
        )

    def watch_engine(self, stats: Callable[[], EngineNumbers], heartbeat_age: Callable[[], float]) -> None:
        """Read the engine's own numbers at every scrape."""
        self.registry.register(_EngineCollector(stats, heartbeat_age))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class _EngineCollector:
    def __init__(self, stats: Callable[[], EngineNumbers], heartbeat_age: Callable[[], float]) -> None:
        self._stats = stats
        self._heartbeat_age = heartbeat_age

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("precis_queue_depth", "Texts waiting for a slot", stats.waiting)
        yield GaugeMetricFamily("precis_running", "Texts being decoded", stats.running)
        yield GaugeMetricFamily("precis_slots", "Texts that can be decoded together", stats.slots)
        yield CounterMetricFamily("precis_engine_steps", "Decode steps", sum(stats.step_texts.counts))
        yield CounterMetricFamily(
            "precis_engine_tokens", "Tokens decoded, one a running text and step", stats.step_texts.total
        )
        yield CounterMetricFamily("precis_engine_rows", "Rows decoded, one a beam and step", stats.rows)
        yield _histogram("precis_encode_duration_seconds", "A call of the encoder", stats.encode_seconds)
        yield _histogram("precis_decode_step_duration_seconds", "A decode step of all that runs", stats.step_seconds)
        yield _histogram("precis_batch_texts", "Texts running in a decode step", stats.step_texts)
        yield CounterMetricFamily("precis_cancelled", "Texts aborted because their caller left", stats.cancelled)
        late = CounterMetricFamily("precis_deadline_drops", "Texts dropped at their deadline", labels=["stage"])
        late.add_metric(["waiting"], stats.late_waiting)
        late.add_metric(["decoding"], stats.late_running)
        yield late
        yield GaugeMetricFamily(
            "precis_heartbeat_age_seconds", "Since the engine last gave a sign of life", self._heartbeat_age()
        )


def _histogram(name: str, documentation: str, values: EngineDistribution) -> HistogramMetricFamily:
    bounds = [*map(floatToGoString, values.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(list(values.counts)), strict=True))
    return HistogramMetricFamily(name, documentation, buckets, values.total)
