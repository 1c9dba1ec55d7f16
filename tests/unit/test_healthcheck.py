"""The image's HEALTHCHECK: which port it asks, what it makes of the answer, and that it is cheap."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from app.healthcheck import port, ready
from tests.shipped import ROOT


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that answers everything with this status; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, ["python", "-m", "app"], 8000),
        ({"PRECIS_PORT": "9000"}, ["python", "-m", "app"], 9000),
        ({"PRECIS_PORT": "8000"}, ["docker-init", "--", "python", "-m", "app", "serve"], 8080),
        ({"SAGEMAKER_BIND_TO_PORT": "8081"}, ["python", "-m", "app", "serve"], 8081),
        ({"PRECIS_PORT": "8000", "AIP_HTTP_PORT": "7080"}, ["python", "-m", "app"], 7080),
    ],
)
def test_it_asks_where_a_server_started_so_listens(
    environment: dict[str, str], arguments: list[str], expected: int
) -> None:
    assert port(environment, arguments) == expected


@pytest.mark.parametrize(("status", "expected"), [(200, True), (503, False), (404, False)])
def test_only_200_is_ready(status: int, expected: bool) -> None:
    with answering(status) as listening:
        assert ready(listening)[0] is expected


def test_nobody_there_is_not_ready() -> None:
    with answering(200) as closed:
        pass
    is_ready, words = ready(closed)
    assert not is_ready
    assert str(closed) in words


def test_it_starts_without_torch_and_fastapi() -> None:
    code = "import sys, app.healthcheck; print(sorted({'torch', 'fastapi', 'pydantic', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
