"""`traceparent` as the standard has it, which variables switch telemetry on, and that nothing is loaded without."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_trace_id, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app import tracing
from app.tracing import OpenTelemetry, Tracing, exporter_name, from_environment, trace_id_of
from tests.unit.test_imports import ROOT, imports_below, top

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = (
    f"00-{TRACE}-{PARENT}-01",
    f"00-{TRACE}-{PARENT}-00",
    f"00-{TRACE}-{PARENT}-ff",
    f" \t00-{TRACE}-{PARENT}-01 ",
    f"01-{TRACE}-{PARENT}-01",
    f"cc-{TRACE}-{PARENT}-01-what-a-later-version-adds",
)
INVALID = (
    "",
    "00",
    f"ff-{TRACE}-{PARENT}-01",
    f"00-{TRACE}-{PARENT}-01-more",
    f"00-{TRACE}-{PARENT}-01-",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{PARENT}-01",
    f"00-{TRACE[:-1]}-{PARENT}-01",
    f"00-{TRACE}g-{PARENT}-01",
    f"00-{TRACE}-{PARENT}-1",
    f"01-{TRACE}-{PARENT}-01.more",
    f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01",
)


def opentelemetrys_own(traceparent: str) -> str | None:
    """What OpenTelemetry reads in it."""
    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    span = get_current_span(context).get_span_context()
    return format_trace_id(span.trace_id) if span.is_valid else None


@pytest.mark.parametrize("traceparent", [*VALID, *INVALID])
def test_a_traceparent_is_read_as_opentelemetry_reads_it(traceparent: str) -> None:
    expected = TRACE if traceparent in VALID else None
    assert opentelemetrys_own(traceparent) == expected
    assert trace_id_of(traceparent) == expected


@pytest.mark.parametrize(
    ("environment", "traces", "metrics"),
    [
        ({}, "none", "none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "otlp", "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, "otlp", "none"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console", "none"),
        ({"OTEL_TRACES_EXPORTER": " OTLP "}, "otlp", "none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_METRICS_EXPORTER": "none"}, "otlp", "none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "TRUE"}, "none", "none"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "none", "none"),
    ],
)
def test_the_standard_variables_decide(environment: Mapping[str, str], traces: str, metrics: str) -> None:
    assert exporter_name(environment, "TRACES") == traces
    assert exporter_name(environment, "METRICS") == metrics
    built = from_environment(environment)
    assert isinstance(built, OpenTelemetry) == ({traces, metrics} != {"none"})
    built.close()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is zipkin; otlp, console and none are known"),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_TRACES_EXPORTER": "console"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is grpc; what is sent is http/protobuf",
        ),
    ],
)
def test_what_is_not_built_in_is_said(
    environment: Mapping[str, str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    from_environment(environment).close()
    assert words in caplog.text


@pytest.mark.parametrize(
    "missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"]
)
def test_without_the_extra_a_warning_names_the_command_and_the_service_starts(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    caplog.set_level(logging.WARNING)
    built = from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"})
    assert type(built) is Tracing
    (record,) = caplog.records
    assert "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http" in record.getMessage()


def test_a_collector_that_hangs_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(TracerProvider):
        def shutdown(self) -> None:
            time.sleep(5)

    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.1)
    started = time.monotonic()
    OpenTelemetry(Hanging(shutdown_on_exit=False), MeterProvider(shutdown_on_exit=False)).close()
    assert time.monotonic() - started < 3


def test_one_module_knows_opentelemetry() -> None:
    assert {path for path, module in imports_below("app") if top(module) == "opentelemetry"} == {"app/tracing.py"}


@pytest.mark.slow
def test_nothing_of_it_is_loaded_unless_it_is_switched_on() -> None:
    script = """
import json, os, sys
import app.__main__
from app import logs, tracing
logs.configure("info", "text")
tracing.from_environment({})
named = ("opentelemetry.sdk", "opentelemetry.exporter", "google.protobuf", "pythonjsonlogger", "requests")
print(json.dumps([name for name in sys.modules if name.startswith(named)]))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PRECIS_"))}
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(output.stdout) == []
