"""The audit tells "nothing was found" from "nobody could be asked": real pip-audit against a small OSV service."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy.supply_chain.audit import BROKEN, CLEAN, COULD_NOT_ASK, FOUND, audit
from tests.shipped import ROOT

Answer = Callable[[str, str], Any]


def advisory(name: str, fixed: str) -> dict[str, Any]:
    events = [{"introduced": "0"}, {"fixed": fixed}]
    package = {"name": name, "ecosystem": "PyPI"}
    affected = [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}]
    return {"id": f"GHSA-{name}", "aliases": ["CVE-2026-1"], "summary": "bad", "affected": affected}


def knows(*vulnerable: str) -> Answer:
    """A service that knows what every service knows, and these."""
    return lambda name, version: (
        {"vulns": [advisory(name, "9.9")]} if name in vulnerable or (name, version) == ("jinja2", "2.4.1") else {}
    )


@contextmanager
def osv(answer: Answer) -> Iterator[str]:
    """An OSV service on loopback; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["content-length"])))
            said = answer(query["package"]["name"], query["version"])
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "lock.txt"
    file.write_text("# made by hand\nanyio==4.1 \\\n    --hash=sha256:" + "0" * 64 + "\nh11==0.16\n")
    return file


def test_a_service_that_knows_nothing_against_them_makes_it_clean(lock: Path) -> None:
    with osv(knows()) as url:
        result = audit([lock], url)
    assert (result.status, result.lines) == (CLEAN, ("2 packages, none with a known vulnerability",))


def test_a_vulnerability_is_found_and_named_with_its_mend(lock: Path) -> None:
    with osv(knows("anyio")) as url:
        result = audit([lock], url)
    assert (result.status, result.lines) == (FOUND, ("anyio 4.1: CVE-2026-1 (GHSA-anyio), mended in 9.9",))


@pytest.mark.parametrize(
    "answer", [lambda name, version: {}, lambda name, version: b"<html>sign in</html>"], ids=["no news", "a portal"]
)
def test_a_service_that_does_not_know_the_known_was_not_asked(lock: Path, answer: Answer) -> None:
    with osv(answer) as url:
        assert audit([lock], url).status == COULD_NOT_ASK


def test_a_service_that_breaks_midway_is_no_clean_bill(lock: Path) -> None:
    with osv(lambda name, version: knows()(name, version) if name == "jinja2" else b"not JSON") as url:
        assert audit([lock], url).status == BROKEN


def test_nothing_pinned_is_no_clean_bill(tmp_path: Path) -> None:
    (tmp_path / "ranges.txt").write_text("anyio>=4\n")
    assert audit([tmp_path / "ranges.txt"]).status == BROKEN


@pytest.mark.parametrize(
    ("policy", "reachable", "status"),
    [("fail", False, COULD_NOT_ASK), ("warn", False, CLEAN), ("fail", True, FOUND), ("warn", True, FOUND)],
)
def test_a_warning_lets_only_the_unasked_pass(lock: Path, policy: str, reachable: bool, status: int) -> None:
    with osv(knows("h11")) as url:
        asked = url if reachable else "http://127.0.0.1:9/"
        command = [
            sys.executable,
            "-m",
            "deploy.supply_chain.audit",
            str(lock),
            "--osv-url",
            asked,
            "--unreachable",
            policy,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("COULD NOT ASK" in done.stdout) != reachable
