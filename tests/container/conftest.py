"""The built images, run by `docker compose` from the project's own file: `make test-container`, after a build.

Knows the commands of Docker. Does not know how the images came to be. Skipped unless PRECIS_CONTAINER_TESTS=1, because
an engine that happens to be there may hold images of another day.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.shipped import ROOT

IMAGE, TRAIN_IMAGE = "precis:0.1.0", "precis-train:0.1.0"
COMPILER_IMAGE = os.environ.get("PRECIS_COMPILER_IMAGE")
HEALTHY_SECONDS = 120.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what stands in this folder, unless it is asked for."""
    if os.environ.get("PRECIS_CONTAINER_TESTS") != "1":
        skip = pytest.mark.skip(reason="PRECIS_CONTAINER_TESTS is not 1: make test-container")
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(skip)


def docker(
    *words: object, timeout: float = 120, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Docker's to its end."""
    command = ["docker", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=timeout
    )


def docker_ok(*words: object, timeout: float = 120, environment: Mapping[str, str] | None = None) -> str:
    """The same, of a command that must end well; what it printed."""
    done = docker(*words, timeout=timeout, environment=environment)
    assert done.returncode == 0, f"docker {' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def inspect(name: str) -> dict[str, Any]:
    """What Docker knows of a container or an image."""
    found: list[dict[str, Any]] = json.loads(docker_ok("inspect", name))
    return found[0]


@dataclass(frozen=True)
class Container:
    """One that is healthy."""

    name: str
    url: str

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run code inside it, as its user."""
        return docker("exec", self.name, "python", "-c", code)


@contextmanager
def composed(project: str, *others: str, **environment: str) -> Iterator[Container]:
    """`docker compose up` of the service, and others, by the project's file as it is, until the block ends."""
    environment = {"PRECIS_PUBLISHED_PORT": "0", **environment}
    compose = partial(docker_ok, "compose", "-p", f"{project}-{os.getpid()}", environment=environment)
    try:
        compose("up", "-d", "--no-build", "--wait", "--wait-timeout", int(HEALTHY_SECONDS), "precis", *others)
        yield Container(compose("ps", "-q", "precis"), f"http://{compose('port', 'precis', '8000')}")
    finally:
        compose("down", "-v", "--timeout", "5")


@contextmanager
def run(*words: object, port: int) -> Iterator[Container]:
    """`docker run` until the block ends; healthy when it begins. Options, the image, and arguments are the caller's."""
    name = docker_ok("run", "-d", "--read-only", "--tmpfs", "/tmp", "-p", f"127.0.0.1::{port}", *words)
    try:
        until = time.monotonic() + HEALTHY_SECONDS
        while (state := inspect(name)["State"])["Health"]["Status"] != "healthy":
            assert state["Running"], docker("logs", name).stderr
            assert time.monotonic() < until, docker("logs", name).stderr
            time.sleep(0.5)
        yield Container(name, f"http://{docker_ok('port', name, port)}")
    finally:
        docker("rm", "-f", name)


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    """One service for the tests that only ask."""
    with composed("precis-asked") as running:
        yield running
