"""In-flight batching, seen from outside: requests of mixed length join and leave a running batch on the real server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.conftest import Server
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

REQUESTS = 32
# The same work whatever the checkpoint has learnt: the long ones say exactly 100 tokens, the short ones at most 4.
LONG = {"num_beams": 4, "min_new_tokens": 100, "max_new_tokens": 100}
SHORT = {"num_beams": 1, "min_new_tokens": 0, "max_new_tokens": 4}


def summarize(server: Server, text: str, options: dict[str, int]) -> tuple[httpx.Response, float]:
    """The reply, and when it came (monotonic seconds)."""
    body = {"inputs": text, "parameters": {"generate_parameters": options}}
    reply = httpx.post(f"{server.url}/summarize", json=body, timeout=300)
    return reply, time.monotonic()


def test_32_requests_of_mixed_length_sent_at_once_are_all_answered(server: Server) -> None:
    texts = [CONVERSATIONS[i % len(CONVERSATIONS)] + f"\n#Person1#: That makes {i}." for i in range(REQUESTS)]
    options = [{**LONG, "min_new_tokens": n, "max_new_tokens": n} for n in (40, 4, 16, 8)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        replies = list(pool.map(lambda i: summarize(server, texts[i], options[i % 4])[0], range(REQUESTS)))
    assert [reply.status_code for reply in replies] == [200] * REQUESTS
    lengths = [reply.json()[0]["output_tokens"] for reply in replies]
    assert lengths == [options[i % 4]["max_new_tokens"] for i in range(REQUESTS)]


def test_a_short_one_sent_last_returns_before_long_ones_sent_first(server: Server) -> None:
    with ThreadPoolExecutor(5) as pool:
        long = [pool.submit(summarize, server, text, LONG) for text in (*CONVERSATIONS, CONVERSATIONS[0])]
        running = 0.0
        while running < len(long) and not any(future.done() for future in long):
            running = server.metric("precis_running")
        assert running == len(long), "the long ones must be decoding when the short one is sent"
        reply, short_at = summarize(server, CONVERSATIONS[1], SHORT)
        assert reply.json()[0]["output_tokens"] <= 4
        replies = [future.result() for future in long]
    assert all(reply.json()[0]["output_tokens"] == 100 for reply, _ in replies)
    assert short_at < min(at for _, at in replies)
