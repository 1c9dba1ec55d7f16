"""Faults inside a real server process: who pays, what the others get, and what the process does about it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, launch, start_server
from tests.e2e.faulty_server import SECONDS
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

FAULTY = "tests.e2e.faulty_server"


def summarize(server: Server, text: str, tokens: int = 30) -> httpx.Response:
    # Exactly so many tokens: the same work whatever the checkpoint has learnt.
    options = {"num_beams": 4, "min_new_tokens": tokens, "max_new_tokens": tokens}
    body = {"inputs": text, "parameters": {"generate_parameters": options}}
    return httpx.post(f"{server.url}/summarize", json=body, timeout=60)


def summary(server: Server, text: str) -> str:
    reply = summarize(server, text)
    assert reply.status_code == 200, reply.text
    return str(reply.json()[0]["summary_text"])


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


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


def test_a_blocked_event_loop_stalls_the_probes_and_not_the_engine(server: Server, expected: list[str]) -> None:
    alone = time.monotonic()
    summarize(server, CONVERSATIONS[0])
    alone = time.monotonic() - alone
    assert alone < SECONDS, "the machine is too slow for this test"
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(summary, server, CONVERSATIONS[0])
        until(lambda: server.metric("precis_running") or running.done())
        started = time.monotonic()
        blocked = pool.submit(httpx.post, f"{server.url}/block", timeout=30)
        time.sleep(0.2)  # by then the loop sleeps
        assert httpx.get(f"{server.url}/health/live", timeout=30).status_code == 200
        stalled = time.monotonic() - started
        assert stalled > SECONDS * 0.9
        # Decoded while the loop slept: it is there at once, not after a decode of its own.
        assert running.result() == expected[0]
        assert time.monotonic() - started < stalled + alone / 2
        assert blocked.result().status_code == 200


def test_a_hung_engine_is_not_ready_and_recovers(server: Server, expected: list[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(summarize, server, "fault:hang")
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        assert httpx.get(f"{server.url}/health/ready").json() == {"status": "failed"}
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert reply.result().status_code == 200
    until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
    assert summary(server, CONVERSATIONS[0]) == expected[0]


def test_a_dead_engine_thread_fails_everybody_with_503_and_ends_the_process_with_3(
    checkpoint: Path, tmp_path: Path
) -> None:
    with (
        start_server(tmp_path / "log", FAULTY, model=checkpoint, dtype="float32", max_num_seqs=2) as server,
        ThreadPoolExecutor(5) as pool,
    ):
        # Two hold the slots, for the first of them hangs; behind them the fault is the first in the queue.
        running = [pool.submit(summarize, server, text, 60) for text in ("fault:hang", CONVERSATIONS[0])]
        until(lambda: server.metric("precis_running") == 2)
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
            reply = pool.submit(summarize, server, CONVERSATIONS[1])
            until(lambda: server.metric("precis_running") or reply.done())
            server.process.send_signal(signal.SIGKILL)
            assert server.process.wait(10) == -signal.SIGKILL
            with pytest.raises(httpx.TransportError):
                reply.result()
    port = httpx.URL(server.url).port
    with start_server(tmp_path / "second", model=checkpoint, dtype="float32", port=port) as server:
        assert summary(server, CONVERSATIONS[0]) == before


def refusal(log: Path, command: str, **settings: object) -> tuple[int, str]:
    """Exit status and words of a server that does not start."""
    process = launch(log, command, **settings)
    try:
        return process.wait(60), log.read_text()
    finally:
        process.kill()
        process.wait()


def test_a_disk_that_fails_while_the_model_is_read_refuses_the_start(checkpoint: Path, tmp_path: Path) -> None:
    status, words = refusal(tmp_path / "log", f"{FAULTY} disk", model=checkpoint)
    assert status == 2
    assert "error: the model cannot be read: [Errno 5] Input/output error" in words
    assert "Traceback" not in words


def test_a_truncated_weights_file_without_a_manifest_refuses_the_start(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.resolve().iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).symlink_to(file.resolve())
    weights = sorted(tmp_path.glob("*.safetensors"))[0]
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[: len(content) // 2])
    status, words = refusal(tmp_path / "log", "app", model=tmp_path)
    assert status == 2
    assert f"error: {weights} is damaged" in words
    assert "Traceback" not in words
