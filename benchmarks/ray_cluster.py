"""Ray nodes on this machine with Precis on them, and callers: what the Ray tests and benchmarks share.

Knows Ray's local cluster, Serve's status and the replicas' processes. Does not know what is measured with them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
APPLICATION = "precis"
WAIT_SECONDS = 90.0
MARK = "PRECIS_RAY_CLUSTER"  # in the environment of every process of one cluster
TIMEOUT = 120.0


@dataclass(frozen=True)
class Answer:
    """What one request came to; seconds on `time.perf_counter()`. Status 0: the connection broke."""

    sent: float
    done: float
    status: int
    body: bytes

    @property
    def seconds(self) -> float:
        """As its caller saw it."""
        return self.done - self.sent


class ServeCluster:
    """A head node with Serve's controller and proxy, and others."""

    def __init__(self, nodes: Any, mark: str, port: int) -> None:
        self._nodes = nodes
        self._mark = mark
        self.url = f"http://127.0.0.1:{port}"

    def add_node(self, num_cpus: int) -> Any:
        """Another Ray node, as `remove_node` takes it."""
        return self._nodes.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)

    def remove_node(self, node: Any) -> None:
        """Kill a node's processes, its replicas among them; nothing where it is gone already."""
        if node in self._nodes.list_all_nodes():
            self._nodes.remove_node(node, allow_graceful=False)

    def deploy(self, application: Any, replicas: int, rolling: bool = False) -> None:
        """Run an application with so many replicas, in place of the one there was, and wait until they are healthy.

        Args:
            rolling: the one there was goes on until its successor is there, which takes room for both.

        Raises:
            TimeoutError: they are not, after `WAIT_SECONDS`.
        """
        from ray import serve

        if not rolling:
            serve.delete(APPLICATION)
        # `serve.run` waits for replicas that may never come, without a bound.
        serve.run_many([serve.RunTarget(application, APPLICATION)], wait_for_applications_running=False)
        self.wait_for(lambda: self.running() == replicas and self._routed(), f"{replicas} replicas")

    def _routed(self) -> bool:
        """Whether the proxy knows where requests go."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def running(self) -> int:
        """Replicas that take requests."""
        from ray import serve

        found = serve.status().applications.get(APPLICATION)
        states = found.deployments[APPLICATION].replica_states if found else {}
        return int(states.get("RUNNING", 0)) if set(states) <= {"RUNNING"} else -1

    def processes(self) -> dict[int, str]:
        """Ray's and Serve's, oldest first, with the names they give themselves; none of another cluster's."""
        found = []
        for process in psutil.process_iter():
            try:
                named = process.cmdline()[:1]
                if named and process.pid != os.getpid() and process.environ().get(MARK) == self._mark:
                    found.append((process.create_time(), process.pid, named[0]))
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return {pid: name for _, pid, name in sorted(found)}

    def replica_pids(self) -> list[int]:
        """Processes of the replicas that take requests, as Serve knows them, oldest first; not those of a lost node."""
        from ray.serve.context import _get_global_client

        found = _get_global_client().get_serve_details()["applications"].get(APPLICATION)
        replicas = found["deployments"][APPLICATION]["replicas"] if found else []
        running = [replica for replica in replicas if replica["state"] == "RUNNING"]
        return [int(replica["pid"]) for replica in sorted(running, key=lambda replica: float(replica["start_time_s"]))]

    def processor_seconds(self) -> dict[str, float]:
        """Computed so far by the replicas, Serve's proxy, Ray's other processes, this one, and all others.

        Others are whoever the cores went to, this machine's processes or, where it is a virtual one, its neighbours.
        """
        sums = {"replicas": 0.0, "proxy": 0.0, "Ray": 0.0}
        replicas = set(self.replica_pids())
        for pid, name in self.processes().items():
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            kind = "replicas" if pid in replicas else "proxy" if "ProxyActor" in name else "Ray"
            sums[kind] += times.user + times.system
        sums["callers"] = time.process_time()
        machine = psutil.cpu_times()
        spent = machine.user + machine.nice + machine.system + getattr(machine, "steal", 0.0)  # Linux knows it
        return {**sums, "others": spent - sum(sums.values())}

    def wait_for(self, reached: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Poll until it is so.

        Raises:
            TimeoutError: it is not, after so many seconds.
        """
        until = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > until:
                raise TimeoutError(f"waited {seconds:g} s for {what}; running: {self.running()}")
            time.sleep(0.1)


STORE_BYTES = 100 << 20  # Ray's object store, of each node; nothing of ours goes through it


@contextmanager
def serve_cluster(*nodes: int) -> Iterator[ServeCluster]:
    """Ray nodes with so many cores each, by Ray's count; the first is the head and has the only proxy."""
    mark = uuid.uuid4().hex
    own = {
        MARK: mark,
        "PYTHONPATH": str(ROOT),
        "PRECIS_ALLOW_ANONYMOUS": "true",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.proxy:middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
        # The proxy shares the cores with the replicas here, and may be asked late.
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": nodes[0], "include_dashboard": False, **store})
    try:
        for num_cpus in nodes[1:]:
            cluster.add_node(num_cpus=num_cpus, **store)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        port = _free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield ServeCluster(cluster, mark, port)
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Load:
    """So many callers, each with one request at a time, one body after the other."""

    def __init__(self, url: str, bodies: Sequence[bytes]) -> None:
        self.answers: list[Answer] = []
        self.in_flight = 0
        self._url = url
        self._bodies = bodies
        self._next = 0

    async def run(self, callers: int, stop: asyncio.Event) -> None:
        """Until `stop`; what is under way then is awaited."""
        async with client(self._url) as http, asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(self._caller(http, stop))

    async def _caller(self, http: httpx.AsyncClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._next += 1
            self.in_flight += 1
            try:
                answer = await ask(http, self._bodies[self._next % len(self._bodies)])
            finally:
                self.in_flight -= 1
            self.answers.append(answer)

    def by_status(self) -> dict[int, int]:
        """How many of each."""
        counts: dict[int, int] = {}
        for answer in self.answers:
            counts[answer.status] = counts.get(answer.status, 0) + 1
        return counts


def client(url: str) -> httpx.AsyncClient:
    """One that opens as many connections as it is asked for."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits)


async def ask(http: httpx.AsyncClient, body: bytes) -> Answer:
    """One request, tried once."""
    sent = time.perf_counter()
    try:
        reply = await http.post("/summarize", content=body, headers={"content-type": "application/json"})
        return Answer(sent, time.perf_counter(), reply.status_code, reply.content)
    except httpx.TransportError:
        return Answer(sent, time.perf_counter(), 0, b"")
