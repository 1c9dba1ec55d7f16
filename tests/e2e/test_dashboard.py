"""What deploy/ tells Prometheus and Grafana, against a real Prometheus that watches the real server under load.

Needs `prometheus` and `promtool` on the path (Debian's package has both) and is skipped without them. Grafana itself is
not run: a panel's queries are asked of Prometheus as Grafana would ask them, with its variables filled in.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import start_server
from tests.shipped import CONVERSATIONS, ROOT

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "precis.json"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
VARIABLES = {"$__rate_interval": "10s", "$instance": ".*", "$route": "/summarize"}
# Nothing of this happens under the load below, and what stands there is a true zero.
AT_REST = {"Failed", "Slower than 10 s"}
WATCH_SECONDS = 60.0

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason="prometheus and promtool are not on the path"),
]


@dataclass(frozen=True)
class Query:
    """One line of one panel."""

    panel: str
    legend: str
    expression: str


def queries() -> list[Query]:
    """Of every panel of the dashboard, variables filled in."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found.append(Query(panel["title"], target["legendFormat"], expression))
    return found


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, timeout=60)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """Prometheus with the project's configuration, but for this target and a scrape a second; a client of it."""
    for name in ("prometheus.yml", "rules.yml"):
        text = (DEPLOY / "prometheus" / name).read_text()
        (folder / name).write_text(text.replace("precis:8000", target).replace("_interval: 15s", "_interval: 1s"))
    assert target in (folder / "prometheus.yml").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(PROMETHEUS), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as client:
            _wait_until_ready(client, process, folder / "log")
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.TransportError):
            if client.get("/-/ready").is_success:
                return
        time.sleep(0.1)
    raise AssertionError(f"prometheus did not start:\n{log.read_text()}")


def ask(client: httpx.Client, query: Query) -> dict[str, float]:
    """The present value of every series of a query, by its legend."""
    reply = client.get("/api/v1/query", params={"query": query.expression})
    assert reply.is_success, f"{query}: {reply.text}"
    series = reply.json()["data"]["result"]
    return {_legend(query.legend, one["metric"]): float(one["value"][1]) for one in series}


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels[found[1]], template)


async def _call_for_ever(url: str, kind: int) -> None:
    """One caller of the mixed load: most ask for summaries; some are refused, run late, or leave."""
    texts = list(CONVERSATIONS) if kind % 2 else CONVERSATIONS[kind % 3]
    body: dict[str, Any] = {"inputs": texts}
    headers: dict[str, str] = {}
    timeout = 60.0
    if kind == 0:
        timeout = 0.05  # leaves
    elif kind == 1:
        headers = {"X-Request-Timeout": "0.1"}
    elif kind == 2:
        body = {"inputs": "word " * 2000, "parameters": {"truncation": "longest_first"}}
    elif kind == 3:
        body = {"inputs": "word " * 2000}
    async with httpx.AsyncClient(base_url=url, timeout=timeout) as client:
        while True:
            with suppress(httpx.TimeoutException):
                reply = await client.post("/summarize", json=body, headers=headers)
                if reply.is_error:
                    await asyncio.sleep(0.05)


def _watch(client: httpx.Client, asked: list[Query]) -> dict[Query, dict[str, float]]:
    """The first values of every query, or what there is after a minute."""
    until = time.monotonic() + WATCH_SECONDS
    seen: dict[Query, dict[str, float]] = {}
    while True:
        # Not all at one time: what some show, such as a queue, comes and goes.
        seen |= {query: ask(client, query) for query in asked if not _has_data(query, seen.get(query, {}))}
        if all(map(_has_data, seen, seen.values())) or time.monotonic() > until:
            return seen
        time.sleep(1)


def _has_data(query: Query, series: dict[str, float]) -> bool:
    finite = bool(series) and all(map(math.isfinite, series.values()))
    return finite and (query.panel in AT_REST or max(series.values()) > 0)


async def _under_load(url: str, client: httpx.Client, asked: list[Query]) -> dict[Query, dict[str, float]]:
    callers = [asyncio.create_task(_call_for_ever(url, kind)) for kind in range(14)]
    try:
        return await asyncio.to_thread(_watch, client, asked)
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


def test_promtool_accepts_configuration_and_rules() -> None:
    checked = promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "rules found" in checked.stdout


def test_each_alert_fires_on_its_cause_and_not_without_it() -> None:
    tested = promtool("test", "rules", DEPLOY / "prometheus" / "rules_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.slow
def test_every_panel_has_data_and_every_rule_a_value_while_the_server_works(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = queries()
    with (
        # Room for fewer requests than there are callers: some get 429. Fewer slots than texts: some wait.
        start_server(tmp_path / "server", model=checkpoint, max_queue_requests=10, max_num_seqs=8) as server,
        prometheus(tmp_path, server.url.removeprefix("http://")) as client,
    ):
        seen = asyncio.run(_under_load(server.url, client, asked))
        rules = [r for g in client.get("/api/v1/rules").json()["data"]["groups"] for r in g["rules"]]
    with capsys.disabled():
        print(f"\n\n{'panel':42} {'series':40} value")
        for query, series in seen.items():
            for legend, value in series.items() or [("none", math.nan)]:
                print(f"{query.panel:42} {legend:40} {value:.4g}")
    assert [query for query, series in seen.items() if not _has_data(query, series)] == []
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    assert len(rules) > 20
