"""Where a request's time went, told to OpenTelemetry: the one module that knows it, and its GenAI names.

Off unless the standard OTEL_ variables ask for it. Off, it imports nothing and records nothing, and still knows a
caller's trace id, for logs. Does not know texts, nor what the stages of a request do.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer, TracerProvider

logger = logging.getLogger(__name__)

OPERATION_NAME, OPERATION = "gen_ai.operation.name", "summarize"
PROVIDER_NAME, PROVIDER = "gen_ai.provider.name", "precis"
REQUEST_MODEL = "gen_ai.request.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
REQUEST_DURATION = "gen_ai.server.request.duration"
TEXT_INDEX = "precis.text.index"
# Seconds, as the convention advises.
DURATION_BOUNDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
CLOSE_SECONDS = 5.0  # for the last spans to be sent, when the process ends
INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"

# https://www.w3.org/TR/trace-context/: what a later version adds stands behind another dash.
_TRACEPARENT = re.compile(r"[ \t]*([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?[ \t]*")
_NANOSECONDS = 1_000_000_000


class RequestTrace:
    """What becomes of one request; this one only knows which trace the caller said it belongs to."""

    def __init__(self, trace_id: str | None = None) -> None:
        self.trace_id = trace_id

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A span around a block that belongs to the whole request."""
        yield

    def text(self, index: int, submitted_ns: int, seconds: Mapping[str, float], tokens: tuple[int, int]) -> None:
        """Spans of one text's stages, which lie one behind the other.

        Args:
            index: of the text in the request.
            submitted_ns: when the first stage began, in nanoseconds since 1970.
            seconds: of each stage, by its name, in their order.
            tokens: of the source as encoded, and of the best hypothesis.
        """

    def usage(self, input_tokens: int, output_tokens: int) -> None:
        """The tokens of all texts."""

    def summarizing(self) -> None:
        """Its body was understood: what follows is a model's work, and counts as such."""

    def end(self, method: str, route: str | None, status: int, model: str | None, seconds: float) -> None:
        """The reply is out; `route` None: there was none for it; `status` 0: it was not sent."""


class Tracing:
    """Begins the trace of each request; this one records nothing."""

    def request(self, method: str, headers: Mapping[str, str]) -> RequestTrace:
        """Begin; `headers` have lower-case names and, where one came more than once, its values joined by commas."""
        return RequestTrace(trace_id_of(headers.get("traceparent", "")))

    def close(self) -> None:
        """Send what was recorded and not sent yet."""


class OpenTelemetry(Tracing):
    """Sends spans and durations to these providers.

    Probes and scrapes are GETs and come all the time; work comes as POST. Only that is traced.
    """

    def __init__(self, tracer_provider: TracerProvider, meter_provider: MeterProvider) -> None:
        self._providers = (tracer_provider, meter_provider)
        self._tracer = tracer_provider.get_tracer("precis")
        self._duration = meter_provider.get_meter("precis").create_histogram(
            REQUEST_DURATION,
            unit="s",
            description="Generative AI server request duration such as time-to-last byte or last output token.",
            explicit_bucket_boundaries_advisory=DURATION_BOUNDS,
        )

    def request(self, method: str, headers: Mapping[str, str]) -> RequestTrace:
        """Begin a span whose parent is the caller's."""
        if method != "POST":
            return super().request(method, headers)
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        parent = propagate.extract(headers)
        return _RecordedTrace(
            self._tracer, self._tracer.start_span(method, context=parent, kind=SpanKind.SERVER), self._duration
        )

    def close(self) -> None:
        """Send the rest; a collector that does not answer must not hold the process's end."""
        threads = [
            threading.Thread(target=provider.shutdown, daemon=True)
            for provider in self._providers
            if hasattr(provider, "shutdown")
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))


class _RecordedTrace(RequestTrace):
    def __init__(self, tracer: Tracer, span: Span, duration: Histogram) -> None:
        from opentelemetry.trace import format_trace_id, set_span_in_context

        super().__init__(format_trace_id(span.get_span_context().trace_id))
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._duration = duration
        self._summarizes = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        from opentelemetry.trace import StatusCode

        with self._tracer.start_as_current_span(
            # The message of an exception may quote a text.
            name,
            context=self._context,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(StatusCode.ERROR)
                raise

    def text(self, index: int, submitted_ns: int, seconds: Mapping[str, float], tokens: tuple[int, int]) -> None:
        attributes = {TEXT_INDEX: index, INPUT_TOKENS: tokens[0], OUTPUT_TOKENS: tokens[1]}
        start = submitted_ns
        for name, duration in seconds.items():
            end = start + round(duration * _NANOSECONDS)
            self._tracer.start_span(name, self._context, attributes=attributes, start_time=start).end(end)
            start = end

    def usage(self, input_tokens: int, output_tokens: int) -> None:
        self._span.set_attributes({INPUT_TOKENS: input_tokens, OUTPUT_TOKENS: output_tokens})

    def summarizing(self) -> None:
        self._summarizes = True

    def end(self, method: str, route: str | None, status: int, model: str | None, seconds: float) -> None:
        from opentelemetry.trace import StatusCode

        failure = {"error.type": str(status) if status else "client_left"} if status == 0 or status >= 500 else {}
        self._span.set_attributes({"http.request.method": method, **failure})
        if route is not None:
            self._span.update_name(f"{method} {route}")
            self._span.set_attribute("http.route", route)
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        if self._summarizes:
            names = {OPERATION_NAME: OPERATION, PROVIDER_NAME: PROVIDER, **({REQUEST_MODEL: model} if model else {})}
            self._span.set_attributes(names)
            refused = {"error.type": str(status)} if 400 <= status < 500 else failure
            self._duration.record(seconds, {**names, **refused}, self._context)
        self._span.end()


_current: ContextVar[RequestTrace] = ContextVar("trace", default=RequestTrace())  # noqa: B039 - it holds no state


def current() -> RequestTrace:
    """The trace of the request that this task works for; one that records nothing where there is none."""
    return _current.get()


@contextmanager
def use(trace: RequestTrace) -> Iterator[None]:
    """Make it the current one in this block, and in the tasks begun in it."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


def trace_id_of(traceparent: str) -> str | None:
    """The trace id in a `traceparent`, or None if it is not valid and must be ignored."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, parent_id, more = found.groups()
    if version == "ff" or (version == "00" and more) or not trace_id.strip("0") or not parent_id.strip("0"):
        return None
    return trace_id


def from_environment(environment: Mapping[str, str]) -> Tracing:
    """What the OTEL_ variables ask for; where its packages are missing, a warning says how to get them."""
    wanted = {signal: exporter_name(environment, signal) for signal in ("TRACES", "METRICS")}
    if set(wanted.values()) == {"none"}:
        return Tracing()
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        if environment.get(name, "http/protobuf") != "http/protobuf":
            logger.warning("%s is %s; what is sent is http/protobuf.", name, environment[name])
    try:
        return _exporting(wanted["TRACES"], wanted["METRICS"], environment)
    except ImportError as error:
        logger.warning(
            "OTEL_ variables ask for telemetry, and %s is not installed. None is sent: %s", error.name, INSTALL
        )
        return Tracing()


def exporter_name(environment: Mapping[str, str], signal: str) -> str:
    """How a signal ("TRACES", "METRICS") is sent: "otlp", as an endpoint alone means too, "console" or "none"."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    default = "otlp" if any(environment.get(name) for name in endpoints) else "none"
    name = environment.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() or default
    if name not in ("otlp", "console", "none"):
        logger.warning("OTEL_%s_EXPORTER is %s; otlp, console and none are known. None is sent.", signal, name)
        return "none"
    return name


def _exporting(traces: str, metrics: str, environment: Mapping[str, str]) -> OpenTelemetry:
    """Providers of the SDK, which reads the other OTEL_ variables (sampler, headers, timeouts, intervals) itself."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    resource = Resource.create(
        {
            "service.name": "precis",
            "service.version": importlib.metadata.version("precis"),
            **OTELResourceDetector().detect().attributes,
        }
    )
    tracer_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter: SpanExporter | None = ConsoleSpanExporter() if traces == "console" else None
    if traces == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    if exporter is not None:
        tracer_provider.add_span_processor(BatchSpanProcessor(exporter))
    readers: list[MetricReader] = []
    if metrics == "console":
        readers.append(PeriodicExportingMetricReader(ConsoleMetricExporter()))
    if metrics == "otlp":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    return OpenTelemetry(tracer_provider, MeterProvider(readers, resource=resource, shutdown_on_exit=False))
