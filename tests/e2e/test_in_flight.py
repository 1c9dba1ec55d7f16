"""In-flight batching, seen from outside: requests of mixed length join and leave a running batch on the real server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, start_server
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

REQUESTS = 32
# The same work whatever the checkpoint has learnt: a long one says exactly 60 tokens, the short one at most 4.
LONG = {"num_beams": 4, "min_new_tokens": 60, "max_new_tokens": 60}
SHORT = {"num_beams": 4, "min_new_tokens": 0, "max_new_tokens": 4}


def summarize(server: Server, text: str, options: dict[str, int]) -> tuple[httpx.Response, float]:
    """The reply, and when it came (monotonic seconds)."""
    body = {"inputs": text, "parameters": {"generate_parameters": options}}
    reply = server.client.post("/summarize", json=body, timeout=300)
    return reply, time.monotonic()


def texts(count: int) -> list[str]:
    """Conversations of different lengths, no two alike."""
    return [CONVERSATIONS[i % len(CONVERSATIONS)] + f"\n#Person1#: That makes {i}." * (1 + i % 5) for i in range(count)]


def test_32_requests_of_mixed_length_sent_at_once_are_all_answered(server: Server) -> None:
    options = [{**LONG, "min_new_tokens": n, "max_new_tokens": n} for n in (40, 4, 16, 8)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        sent = [pool.submit(summarize, server, text, options[i % 4]) for i, text in enumerate(texts(REQUESTS))]
        replies = [future.result()[0] for future in sent]
    assert [reply.status_code for reply in replies] == [200] * REQUESTS
    lengths = [reply.json()[0]["output_tokens"] for reply in replies]
    assert lengths == [options[i % 4]["max_new_tokens"] for i in range(REQUESTS)]


def test_a_short_one_sent_last_returns_before_31_long_ones_sent_first(checkpoint: Path, tmp_path: Path) -> None:
    *long_texts, short_text = texts(REQUESTS)
    with (
        start_server(tmp_path / "log", model=checkpoint, dtype="float32", max_num_seqs=REQUESTS) as server,
        ThreadPoolExecutor(REQUESTS) as pool,
    ):
        long = [pool.submit(summarize, server, text, LONG) for text in long_texts]
        running = 0.0
        while running < len(long) and not any(future.done() for future in long):
            running = server.metric("precis_running")
        assert running == len(long), "the long ones must all be decoding when the short one is sent"
        reply, short_at = summarize(server, short_text, SHORT)
        replies = [future.result() for future in long]
    assert reply.json()[0]["output_tokens"] <= 4
    assert all(reply.json()[0]["output_tokens"] == 60 for reply, _ in replies)
    assert short_at < min(at for _, at in replies)
