"""`docker compose --profile observability`: the files hold together, and Prometheus, confined, sees the service.

Grafana is not run. What answers as Prometheus may be another version of it than the compose file's: see .ci/containers.
"""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
import yaml

from tests.container.conftest import composed, docker, docker_ok
from tests.shipped import ROOT

PROMETHEUS = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["image"]


def test_all_profiles_and_the_gpu_file_are_compose_files_together() -> None:
    files = ["-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml"]
    shown = docker_ok("compose", *files, "--profile", "observability", "--profile", "train", "config", "--services")
    assert sorted(shown.split()) == ["grafana", "precis", "prometheus", "train"]


def test_prometheus_scrapes_the_composed_service_and_evaluates_its_rules() -> None:
    if docker("image", "inspect", PROMETHEUS).returncode:
        pytest.skip(f"{PROMETHEUS} is not here")
    with composed("precis-watched", "prometheus"), httpx.Client(base_url="http://127.0.0.1:9090") as client:
        up = _first(client, 'up{job="precis"} == 1')
        assert up["metric"]["instance"] == "precis:8000"
        assert float(_first(client, "precis_slots")["value"][1]) == 16
        groups = client.get("/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
        assert sum(len(group["rules"]) for group in groups) > 20


def _first(client: httpx.Client, query: str) -> dict[str, Any]:
    """A query's first series, once there is one: within three scrapes."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            result = client.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
        except httpx.TransportError:
            result = []
        if result:
            first: dict[str, Any] = result[0]
            return first
        time.sleep(0.5)
    raise AssertionError(f"no data: {query}")
