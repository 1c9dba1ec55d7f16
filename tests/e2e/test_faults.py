"""Faults inside a real server process: who pays, what the others get, and what the process does about it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, start_server, until
from tests.e2e.faulty_server import BLOCKING, SECONDS
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

FAULTY = "tests.e2e.faulty_server"
LONG = 120  # tokens: still being decoded when a test comes to what it is about


def summarize(server: Server, text: str, tokens: int = 30) -> httpx.Response:
    # Exactly so many tokens: the same work whatever the checkpoint has learnt.
    options = {"num_beams": 4, "min_new_tokens": tokens, "max_new_tokens": tokens}
    body = {"inputs": text, "parameters": {"generate_parameters": options}}
    return server.client.post("/summarize", json=body)


def summary(server: Server, text: str, tokens: int = 30) -> str:
    reply = summarize(server, text, tokens)
    assert reply.status_code == 200, reply.text
    return str(reply.json()[0]["summary_text"])


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the faults that it survives."""
    log = tmp_path_factory.mktemp("faulty") / "log"
    with start_server(log, FAULTY, model=checkpoint, dtype="float32", max_heartbeat_age=1) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> list[str]:
    """What the conversations give without faults."""
    return [summary(server, text) for text in CONVERSATIONS]


@pytest.mark.parametrize(
    ("fault", "slug"),
    [("tokenizer", "internal-error"), ("encoder", "generation-failed"), ("nan", "generation-failed")],
)
def test_who_meets_a_fault_pays_and_the_others_do_not(
    fault: str, slug: str, server: Server, expected: list[str]
) -> None:
    victim = f"#Person1#: The secret word is heliotrope. fault:{fault}"
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(summary, server, text) for text in CONVERSATIONS]
        reply = pool.submit(summarize, server, victim).result()
        assert [future.result() for future in others] == expected
    assert reply.status_code == 500
    assert reply.json()["type"] == f"/problems/{slug}"
    assert [summary(server, text) for text in CONVERSATIONS] == expected
    assert "heliotrope" not in reply.text + server.log.read_text()


def test_out_of_memory_fails_the_running_and_the_next_are_served(server: Server, expected: list[str]) -> None:
    reply = summarize(server, "fault:oom")
    assert reply.status_code == 500
    assert reply.json()["error"].endswith("a decode step failed: OutOfMemoryError")
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(summarize, server, text) for text in CONVERSATIONS]
        assert pool.submit(summarize, server, "fault:oom").result().status_code == 500
        for future, text in zip(others, expected, strict=True):  # who ran with it fails, who came later does not
            other = future.result()
            assert other.status_code == 500 or other.json()[0]["summary_text"] == text
    assert [summary(server, text) for text in CONVERSATIONS] == expected
    assert server.metric("precis_running") == server.metric("precis_admitted_tokens") == 0


def test_a_blocked_event_loop_stalls_the_probes_and_not_the_engine(server: Server) -> None:
    tokens = 40  # a fraction of the block, and many times what lies between the first step and the block
    expected = summary(server, CONVERSATIONS[0], tokens)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(summarize, server, CONVERSATIONS[0], tokens)
        until(lambda: server.metric("precis_running") or running.done())
        started = time.monotonic()
        blocked = pool.submit(server.client.post, "/block")
        until(lambda: BLOCKING in server.log.read_text())
        assert server.client.get("/health/live").status_code == 200
        assert time.monotonic() - started >= SECONDS
        assert blocked.result().status_code == 200
        reply = running.result()
    assert reply.json()[0]["summary_text"] == expected
    # By the server's own clocks: the whole of the block lay between request and reply, and none of it in the decoding.
    assert milliseconds(reply, "inference") < 1000 * SECONDS < milliseconds(reply, "total")


def milliseconds(reply: httpx.Response, name: str) -> float:
    return float(reply.headers[f"x-{name}-time"])


def test_a_hung_engine_is_not_ready_and_recovers(server: Server, expected: list[str]) -> None:
    def ready() -> tuple[int, object]:
        answer = server.client.get("/health/ready")
        return answer.status_code, answer.json()

    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(summarize, server, "fault:hang")
        until(lambda: ready() == (503, {"status": "failed"}))
        assert server.client.get("/health/live").status_code == 200
        assert reply.result().status_code == 200
    until(lambda: ready() == (200, {"status": "ok"}))
    assert summary(server, CONVERSATIONS[0]) == expected[0]


def test_a_dead_engine_thread_fails_everybody_with_503_and_ends_the_process_with_3(
    checkpoint: Path, tmp_path: Path
) -> None:
    with (
        start_server(tmp_path / "log", FAULTY, model=checkpoint, dtype="float32", max_num_seqs=2) as server,
        ThreadPoolExecutor(5) as pool,
    ):
        # Two hold the slots, and the second of them hangs: time to send the others. The fault is first in the queue.
        running = []
        for slots, (text, tokens) in enumerate(((CONVERSATIONS[0], LONG), ("fault:hang", 30)), start=1):
            running.append(pool.submit(summarize, server, text, tokens))
            until(lambda: server.metric("precis_running") == slots)  # noqa: B023
        waiting = []
        for depth, text in enumerate(("fault:death", *CONVERSATIONS[:2]), start=1):
            waiting.append(pool.submit(summarize, server, text))
            until(lambda: server.metric("precis_queue_depth") == depth)  # noqa: B023
        replies = [future.result() for future in waiting]
        assert server.process.wait(10) == 3
        assert {future.result().status_code for future in running} <= {200, 503}  # 200: done before it died
    assert [reply.status_code for reply in replies] == [503] * 3
    assert all("retry-after" in reply.headers for reply in replies)
    assert "CRITICAL app: the engine thread is dead" in server.log.read_text()


def test_a_killed_process_leaves_nothing_that_hinders_the_next(checkpoint: Path, tmp_path: Path) -> None:
    with start_server(tmp_path / "first", model=checkpoint, dtype="float32") as server:
        before = summary(server, CONVERSATIONS[0])
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(summarize, server, CONVERSATIONS[1], LONG)
            until(lambda: server.metric("precis_running") or reply.done())
            server.process.send_signal(signal.SIGKILL)
            assert server.process.wait(10) == -signal.SIGKILL
            with pytest.raises(httpx.TransportError):
                reply.result()
    port = httpx.URL(server.url).port
    with start_server(tmp_path / "second", model=checkpoint, dtype="float32", port=port) as server:
        assert summary(server, CONVERSATIONS[0]) == before
