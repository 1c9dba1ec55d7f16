"""What an operator sees of a real engine at work: metrics that move, spans, and log lines, none of them with a text.

The model is a tiny one. In-process where that shows it, else a real server process, and for spans a real receiver.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from app.engine.model_runner import ModelRunner
from app.main import create_app
from app.tracing import OpenTelemetry, Tracing
from tests.e2e.conftest import launch
from tests.service import backend_tokenizer, read_settings
from tests.tiny import TinyShape, save, tiny_model

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TEXT = "unaffable world"
KEY = "a-key-that-nobody-may-read"
SECONDS = 60.0
OPTIONS = {"num_beams": 2, "min_new_tokens": 6, "max_new_tokens": 6}
LONG = {"num_beams": 2, "min_new_tokens": 30, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads text, in the Hugging Face layout."""
    tokenizer = backend_tokenizer(None)
    shape = TinyShape(vocab=tokenizer.get_vocab_size())
    folder = save(tiny_model(seed=3, shape=shape), tmp_path_factory.mktemp("models") / "tiny")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@asynccontextmanager
async def serving(
    folder: Path, tracing: Tracing | None = None, **settings: Any
) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    named = {"model": str(folder), "device": "cpu", "dtype": "float32", **settings}
    # The threads of a process are one setting for all that it does: they stay as many as they are.
    app = create_app(read_settings(num_threads=torch.get_num_threads(), **named), tracing=tracing)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=SECONDS) as client,
    ):
        yield app, client


async def summarize(
    client: httpx.AsyncClient, inputs: Any = TEXT, options: dict[str, int] = OPTIONS, **headers: str
) -> httpx.Response:
    body = {"inputs": inputs, "parameters": options}
    return await client.post("/summarize", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    lines = (await client.get("/metrics")).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


async def until(condition: Callable[[dict[str, float]], bool], client: httpx.AsyncClient) -> dict[str, float]:
    async with asyncio.timeout(SECONDS):
        while not condition(found := await metrics(client)):
            await asyncio.sleep(0.005)
    return found


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step takes at least 50 ms, as a large model's does."""
    step = ModelRunner.step

    def slow(self: ModelRunner) -> None:
        time.sleep(0.05)
        step(self)

    monkeypatch.setattr(ModelRunner, "step", slow)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Decode steps are taken while it is set."""
    step, go = ModelRunner.step, threading.Event()

    def held(self: ModelRunner) -> None:
        go.wait(SECONDS)
        step(self)

    monkeypatch.setattr(ModelRunner, "step", held)
    go.set()
    yield go
    go.set()


# Metrics


@pytest.mark.anyio
async def test_a_served_request_moves_what_it_costs(tiny_folder: Path) -> None:
    async with serving(tiny_folder) as (_, client):
        before = await metrics(client)
        assert before["precis_engine_steps_total"] == 0  # warming up is nobody's request
        assert (await summarize(client, [TEXT, "hello"])).status_code == 200
        after = await metrics(client)
    tokens = 2 * 6
    assert after["precis_texts_total"] == 2
    assert after["precis_output_tokens_total"] == after["precis_engine_tokens_total"] == tokens
    assert after["precis_engine_rows_total"] == 2 * tokens
    assert after["precis_batch_texts_sum"] == tokens
    assert 6 <= after["precis_batch_texts_count"] == after["precis_engine_steps_total"] <= tokens
    assert after['precis_batch_texts_bucket{le="2.0"}'] == after["precis_batch_texts_count"]
    assert 1 <= after["precis_encode_duration_seconds_count"] <= 2
    assert after["precis_encode_duration_seconds_sum"] > 0
    assert after["precis_decode_step_duration_seconds_count"] == after["precis_engine_steps_total"]
    assert after["precis_decode_step_duration_seconds_sum"] > 0
    assert after["precis_queue_duration_seconds_count"] == after["precis_inference_duration_seconds_count"] == 2
    assert before["precis_service_rate_tokens_per_second"] == 0 < after["precis_service_rate_tokens_per_second"]
    assert after['precis_requests_total{method="POST",route="/summarize",status="200"}'] == 1


@pytest.mark.anyio
async def test_load_shows_while_it_is_there_and_is_gone_afterwards(tiny_folder: Path, steps: threading.Event) -> None:
    async with serving(tiny_folder, max_num_seqs=1) as (_, client):
        steps.clear()
        both = [asyncio.create_task(summarize(client)) for _ in range(2)]
        found = await until(lambda m: m["precis_running"] == 1 and m["precis_queue_depth"] == 1, client)
        assert found["precis_slots"] == 1
        assert found["precis_admitted_requests"] == 2
        assert found["precis_admitted_tokens"] == 2 * 6
        await until(lambda m: m["precis_heartbeat_age_seconds"] > 0.5, client)  # an idle engine's is half as old
        steps.set()
        await asyncio.gather(*both)
        gone = ("running", "queue_depth", "admitted_requests", "admitted_tokens")
        await until(lambda m: not any(m[f"precis_{name}"] for name in gone), client)


@pytest.mark.anyio
@pytest.mark.usefixtures("slow_steps")
async def test_a_deadline_and_a_caller_that_leaves_are_told_apart(tiny_folder: Path) -> None:
    waiting, decoding = (f'precis_deadline_drops_total{{stage="{stage}"}}' for stage in ("waiting", "decoding"))
    async with serving(tiny_folder, max_num_seqs=1) as (_, client):
        # 30 steps take 1.5 s at least; the engine knows from its warm-up that 4 of them, 0.2 s, can be enough.
        reply = await summarize(client, options=LONG, x_request_timeout="1.2")
        assert reply.status_code == 504
        found = await until(lambda m: m[decoding] == 1, client)
        assert (found[waiting], found["precis_cancelled_total"]) == (0, 0)

        first = asyncio.create_task(summarize(client, options=LONG))
        await until(lambda m: m["precis_running"] == 1, client)
        reply = await summarize(client, x_request_timeout="0.4")
        assert reply.status_code == 504
        assert (await first).status_code == 200
        found = await until(lambda m: m[waiting] == 1, client)
        assert (found[decoding], found["precis_cancelled_total"]) == (1, 0)

        leaving = asyncio.create_task(summarize(client, options=LONG))
        await until(lambda m: m["precis_running"] == 1, client)
        leaving.cancel()
        found = await until(lambda m: m["precis_cancelled_total"] == 1, client)
        assert (found[waiting], found[decoding]) == (1, 1)
        assert found['precis_errors_total{kind="deadline-exceeded"}'] == 2


# Spans


class Recorder:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        tracer_provider = TracerProvider(shutdown_on_exit=False)
        tracer_provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.reader = InMemoryMetricReader()
        self.tracing = OpenTelemetry(tracer_provider, MeterProvider([self.reader], shutdown_on_exit=False))

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans.get_finished_spans() if span.name == name]

    def durations(self) -> list[HistogramDataPoint]:
        data = self.reader.get_metrics_data()
        found = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics] if data else []
        assert {metric.name for metric in found} <= {"gen_ai.server.request.duration"}
        points = [point for metric in found for point in metric.data.data_points]
        assert all(isinstance(point, HistogramDataPoint) for point in points)
        return points  # type: ignore[return-value]  # the line above


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


@pytest.mark.anyio
async def test_a_request_is_a_span_of_its_callers_trace_and_holds_its_stages(tiny_folder: Path) -> None:
    recorder = Recorder()
    async with serving(tiny_folder, recorder.tracing) as (_, client):
        before = time.time_ns()
        reply = await summarize(client, [TEXT, "hello"], traceparent=TRACEPARENT)
        assert reply.status_code == 200
    (request,) = recorder.named("POST /summarize")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert request.context is not None
    assert format_trace_id(request.context.trace_id) == TRACE
    assert format_span_id(request.parent.span_id) == PARENT
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/summarize",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "summarize",
        "gen_ai.provider.name": "precis",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": sum(item["input_tokens"] for item in reply.json()),
        "gen_ai.usage.output_tokens": 12,
    }
    stages = [recorder.named(name) for name in ("tokenize", "queue", "encode", "decode")]
    assert [len(spans) for spans in stages] == [1, 2, 2, 2]
    for span in (span for spans in stages for span in spans):
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert request.start_time is not None
        assert request.end_time is not None
        assert before <= request.start_time <= span.start_time <= span.end_time
        assert span.end_time <= request.end_time + 2_000_000  # two clocks: time() and monotonic()
    for index in range(2):
        spans = [next(s for s in of if attributes(s)["precis.text.index"] == index) for of in stages[1:]]
        assert [spans[0].end_time, spans[1].end_time] == [spans[1].start_time, spans[2].start_time]
        assert attributes(spans[2])["gen_ai.usage.output_tokens"] == 6
    (point,) = recorder.durations()
    assert point.count == 1
    assert dict(point.attributes or {}) == {
        "gen_ai.operation.name": "summarize",
        "gen_ai.provider.name": "precis",
        "gen_ai.request.model": "tiny",
    }


@pytest.mark.anyio
async def test_errors_are_told_by_kind_and_never_in_words(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    async with serving(tiny_folder, recorder.tracing) as (app, client):
        assert (await summarize(client, "unaffable " * 70)).status_code == 413
        assert (await client.post("/summarize?q=unaffable", json={"unaffable": 1})).status_code == 422

        def fail(texts: list[str], *_: object) -> None:
            raise RuntimeError(f"cannot read {texts}")

        monkeypatch.setattr(app.state.runtime.model.summarizer.tokenizer, "encode", fail)
        assert (await summarize(client)).status_code == 500
        assert (await client.get("/health")).status_code == 200
        assert (await client.post("/unaffable")).status_code == 404
    (nowhere,) = recorder.named("POST")
    assert "http.route" not in attributes(nowhere)
    requests = recorder.named("POST /summarize")
    assert [attributes(span)["http.response.status_code"] for span in requests] == [413, 422, 500]
    assert [span.status.status_code for span in requests] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    assert [attributes(span)["error.type"] for span in recorder.named("tokenize")] == ["InputTooLong", "RuntimeError"]
    assert len(recorder.spans.get_finished_spans()) == 6  # probes leave none
    assert "unaffable" not in "".join(span.to_json() for span in recorder.spans.get_finished_spans())
    kinds = [dict(point.attributes or {})["error.type"] for point in recorder.durations()]
    assert sorted(map(str, kinds)) == ["413", "500"]  # the body behind the 422 was no request to a model


@pytest.mark.anyio
async def test_concurrent_requests_keep_their_spans_apart(tiny_folder: Path) -> None:
    recorder = Recorder()
    traces = [f"{i:032x}" for i in range(1, 9)]
    async with serving(tiny_folder, recorder.tracing) as (_, client):
        await asyncio.gather(*(summarize(client, traceparent=f"00-{trace}-{PARENT}-01") for trace in traces))
    for name in ("POST /summarize", "tokenize", "queue", "encode", "decode"):
        assert sorted(format_trace_id(s.context.trace_id) for s in recorder.named(name) if s.context) == traces


@pytest.mark.anyio
async def test_a_streamed_request_has_its_spans_too(tiny_folder: Path) -> None:
    recorder = Recorder()
    async with serving(tiny_folder, recorder.tracing) as (_, client):
        assert "event: done" in (await summarize(client, accept="text/event-stream")).text
    (request,) = recorder.named("POST /summarize")
    assert attributes(request)["gen_ai.usage.output_tokens"] == 6
    assert len(recorder.named("decode")) == 1


@pytest.mark.anyio
async def test_a_traceparent_is_logged_without_any_collector(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from app import logs

    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(logs.prepare)
    try:
        async with serving(tiny_folder) as (_, client):
            await summarize(client, traceparent=TRACEPARENT, x_request_id="one")
            await summarize(client, traceparent=TRACEPARENT.replace("00-", "ff-", 1), x_request_id="two")
            await client.get("/health", headers={"traceparent": TRACEPARENT, "x-request-id": "three"})
    finally:
        caplog.handler.removeFilter(logs.prepare)
    lines = {vars(r)["request_id"]: vars(r) for r in caplog.records if r.name == "app.access"}
    assert [lines[name].get("trace_id") for name in ("one", "two", "three")] == [TRACE, None, TRACE]
    assert lines["one"]["route"] == "/summarize"


# The real process


class Collector(BaseHTTPRequestHandler):
    """Takes what OTLP/HTTP sends."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    received: list[tuple[str, bytes]] = []
    server = HTTPServer(("127.0.0.1", 0), type("Collecting", (Collector,), {"received": received}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def process(
    log: Path, command: str = "app", variables: Mapping[str, str] | None = None, /, **settings: object
) -> Iterator[tuple[str, Callable[[], int]]]:
    """A real server that writes JSON; its address, and how to end it."""
    running = launch(log, command, variables, log_format="json", device="cpu", dtype="float32", **settings)
    try:
        until = time.monotonic() + SECONDS
        while (found := re.search(r'"url": "(http://[^"]+)"', log.read_text())) is None:
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)

        def stop() -> int:
            running.terminate()
            return running.wait(SECONDS)

        yield found[1], stop
    finally:
        running.kill()
        running.wait()


@pytest.mark.e2e
def test_a_collector_receives_spans_and_durations_over_otlp(tiny_folder: Path, tmp_path: Path) -> None:
    with collector() as (endpoint, received):
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        }
        with process(tmp_path / "log", "app", variables, model=tiny_folder) as (url, stop):
            body = {"inputs": TEXT, "parameters": OPTIONS}
            reply = httpx.post(f"{url}/summarize", json=body, headers={"traceparent": TRACEPARENT}, timeout=SECONDS)
            assert reply.status_code == 200
            assert stop() == 0  # what is not sent yet is sent at the end
    spans, resources = [], []
    for _, payload in (post for post in received if post[0] == "/v1/traces"):
        for group in ExportTraceServiceRequest.FromString(payload).resource_spans:
            resources.append({entry.key: entry.value.string_value for entry in group.resource.attributes})
            spans += [span for scope in group.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"POST /summarize", "tokenize", "queue", "encode", "decode"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    request = next(span for span in spans if span.name == "POST /summarize")
    assert request.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in spans if span is not request} == {request.span_id}
    values = {entry.key: entry.value for entry in request.attributes}
    assert values["gen_ai.request.model"].string_value == "tiny"
    assert values["gen_ai.usage.output_tokens"].int_value == 6
    assert resources[0]["service.name"] == "precis"
    assert resources[0]["deployment.environment.name"] == "test"
    names = {
        metric.name: metric.histogram.data_points[0].count
        for path, payload in received
        if path == "/v1/metrics"
        for group in ExportMetricsServiceRequest.FromString(payload).resource_metrics
        for scope in group.scope_metrics
        for metric in scope.metrics
    }
    assert names == {"gen_ai.server.request.duration": 1}
    sent = b"".join(payload for _, payload in received)
    assert b"unaffable" not in sent
    assert reply.json()[0]["summary_text"].encode() not in sent


@pytest.mark.e2e
def test_a_missing_collector_costs_no_request_and_no_clean_end(tiny_folder: Path, tmp_path: Path) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}  # discard: nobody listens
    with process(tmp_path / "log", "app", variables, model=tiny_folder) as (url, stop):
        reply = httpx.post(f"{url}/summarize", json={"inputs": TEXT, "parameters": OPTIONS}, timeout=SECONDS)
        assert reply.status_code == 200
        started = time.monotonic()
        assert stop() == 0
        assert time.monotonic() - started < 15
    assert all(json.loads(line) for line in (tmp_path / "log").read_text().splitlines())


@pytest.mark.e2e
@pytest.mark.parametrize("level", ["info", "debug"])
def test_every_line_is_json_with_its_requests_id_and_without_texts_or_keys(
    tiny_folder: Path, tmp_path: Path, level: str
) -> None:
    log = tmp_path / "log"
    settings = {"model": tiny_folder, "api_keys": f"me:{KEY}", "log_level": level}
    with process(log, "tests.e2e.faulty_server", **settings) as (url, stop):

        def post(name: str, body: object, key: str = KEY) -> httpx.Response:
            headers = {"x-request-id": name, "traceparent": TRACEPARENT, "authorization": f"Bearer {key}"}
            return httpx.post(f"{url}/summarize?q=unaffable", json=body, headers=headers, timeout=SECONDS)

        replies = {
            "r-200": post("r-200", {"inputs": TEXT, "parameters": OPTIONS}),
            "r-401": post("r-401", {"inputs": TEXT}, key="another-key-of-somebody"),
            "r-413": post("r-413", {"inputs": "unaffable " * 70}),
            "r-422": post("r-422", {"inputs": TEXT, "unaffable": "unaffable"}),
            "r-500": post("r-500", {"inputs": f"{TEXT} fault:tokenizer"}),
            "r-500-engine": post("r-500-engine", {"inputs": f"{TEXT} fault:encoder"}),
        }
        assert [reply.status_code for reply in replies.values()] == [200, 401, 413, 422, 500, 500]
        dead = post("r-503", {"inputs": f"{TEXT} fault:death"})
        assert dead.status_code == 503
        assert stop() == 3  # its own end came first
    written = log.read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    access = {line["request_id"]: line for line in lines if line["logger"] == "app.access"}
    for name, reply in [*replies.items(), ("r-503", dead)]:
        line = access[name]
        route = "unmatched" if reply.status_code == 401 else "/summarize"  # without a key, no route is looked for
        assert (line["method"], line["route"], line["status"]) == ("POST", route, reply.status_code), name
        assert line["trace_id"] == TRACE
        assert line["duration_ms"] >= 0
    failed = [line for line in lines if line["level"] == "ERROR" and line.get("request_id") == "r-500"]
    assert len(failed) == 2  # the kind of failure, and its frames
    assert {line["trace_id"] for line in failed} == {TRACE}
    assert any(line["logger"].startswith("uvicorn") for line in lines)
    encoder = next(line for line in lines if "the encoder failed" in line.get("exception", ""))
    assert encoder["logger"] == "app.engine.engine"
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)
    summary = replies["r-200"].json()[0]["summary_text"]
    assert len(summary) > 4
    for secret in ("unaffable", summary, KEY, "another-key-of-somebody"):
        assert secret not in written


@pytest.mark.e2e
def test_a_refused_start_is_a_json_line_too(tmp_path: Path) -> None:
    running = launch(tmp_path / "log", "app", log_format="json", model=tmp_path / "nothing")
    assert running.wait(SECONDS) == 2
    (line,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert line["level"] == "CRITICAL"
    assert str(tmp_path / "nothing") in line["message"]
