"""The real server: `python -m app` as a process on a free port, with the shipped checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.shipped import ROOT, shipped_folder

START_SECONDS = 90.0
# Whatever the shell of who runs the tests says to servers of its own.
NOT_INHERITED = ("PRECIS_", "OTEL_")


@dataclass
class Server:
    """A process that has said it is ready, and a client of it that threads may share."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    def metric(self, name: str) -> float:
        """The present value of one metric without labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def stop(self) -> int:
        """Send SIGTERM and wait; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


Start = Callable[..., Any]


def launch(
    log: Path, command: str, variables: Mapping[str, str] | None = None, /, **settings: object
) -> subprocess.Popen[bytes]:
    """Run `python -m command` with these settings, and no others, on a free port unless one is given.

    Args:
        variables: of the environment, beside the settings.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    environment |= {"PRECIS_PORT": "0"} | {f"PRECIS_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= variables or {}
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *command.split()], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )


@contextmanager
def start_server(log: Path, command: str = "app", **settings: object) -> Iterator[Server]:
    """Run until the block ends. The port is read from what the server prints, as a person would."""
    process = launch(log, command, **settings)
    try:
        url = _wait_for_url(process, log)
        # Made once, because reading certificates takes longer than many a request. A connection for each request: none
        # is kept that the server may just be closing, or that would count among its open files.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        with httpx.Client(base_url=url, verify=False, timeout=60, limits=limits) as client:
            yield Server(url, process, log, client)
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for what must happen soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"curl (http://\S+)/summarize", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The shipped checkpoint, or the folder that PRECIS_E2E_MODEL names."""
    named = os.environ.get("PRECIS_E2E_MODEL")
    folder = Path(named) if named else shipped_folder()
    assert folder is not None, "model_store/ holds no checkpoint, and the repository ships one"
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that only ask."""
    log = tmp_path_factory.mktemp("server") / "log"
    with start_server(log, model=checkpoint, dtype="float32") as running:
        yield running
