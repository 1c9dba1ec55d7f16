"""One cluster of two Ray nodes on this machine, one core and one torch thread for each replica."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ray_cluster import ServeCluster, serve_cluster
from benchmarks.traffic import conversations
from tests.shipped import shipped_folder

GREEDY = {"num_beams": 1, "max_new_tokens": 24, "min_new_tokens": 24}  # as much work for every text


@pytest.fixture(scope="session")
def cluster() -> Iterator[ServeCluster]:
    """A head with the controller, the proxy and room for a replica; `worker` is the other node."""
    with serve_cluster(1) as running:
        yield running


@pytest.fixture
def worker(cluster: ServeCluster) -> Iterator[Any]:
    """The second node, with room for one replica; it may be gone at the end."""
    node = cluster.add_node(1)
    yield node
    cluster.remove_node(node)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The shipped checkpoint."""
    folder = shipped_folder()
    assert folder is not None, "model_store/ holds no checkpoint, and the repository ships one"
    return folder


@pytest.fixture(scope="session")
def build(checkpoint: Path) -> Callable[..., Any]:
    """An application of the shipped checkpoint; by name what `Arguments` takes."""
    from deploy.ray.application import Arguments
    from deploy.ray.application import build as build_application

    def built(replicas: int, **more: Any) -> Any:
        settings = {"dtype": "float32", "log_level": "warning", "drain_timeout": 10, **more.pop("settings", {})}
        bounds = {"min_replicas": replicas, "max_replicas": replicas}
        more = {"model": str(checkpoint), "health_check_period_s": 0.5, **bounds, **more}
        return build_application(Arguments(settings=settings, **more))

    return built


@pytest.fixture(scope="session")
def bodies() -> list[bytes]:
    """Requests of one text each."""
    parameters = {"generate_parameters": GREEDY}
    return [json.dumps({"inputs": text, "parameters": parameters}).encode() for text in conversations(19)]
