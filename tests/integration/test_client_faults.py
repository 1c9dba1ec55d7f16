"""Whatever the network and the server do, each text gets exactly one answer, in its place, and is not asked again."""

from __future__ import annotations

from collections import Counter

import pytest

from app.client import AsyncSummarizer, ClientError, EngineFailed, InputTooLong, RetryPolicy, Summarizer
from app.client.retry import STATUSES
from tests.integration.unreliable_server import FAULTS, UnreliableServer, listening

TEXTS = [f"text {i}" for i in range(10_000)]
# Short waits: what is tested is that nothing is lost or asked twice, not that it takes long.
PATIENT = RetryPolicy(max_retries=30, first_wait=0.01, longest_wait=0.05, statuses=STATUSES | {500})
ATTEMPT_SECONDS = 2.0


@pytest.mark.slow
def test_ten_thousand_texts_get_exactly_one_answer_each_in_order() -> None:
    server = UnreliableServer(seed=7)
    with (
        listening(server) as url,
        Summarizer(url, retry=PATIENT, max_concurrency=8, attempt_timeout=ATTEMPT_SECONDS) as summarizer,
    ):
        summaries = summarizer.summarize_many(TEXTS)
    assert [summary.summary_text for summary in summaries] == [text[::-1] for text in TEXTS]
    assert server.answered == Counter(TEXTS)
    assert server.repeated == []
    assert server.early == []
    assert set(FAULTS) <= set(server.faults), "the dice must have shown every fault"


@pytest.mark.anyio
async def test_bad_texts_are_errors_in_their_places_and_the_others_are_answered_once() -> None:
    texts = TEXTS[:500]
    too_long, failing = texts[3:500:50], texts[4:500:100]
    policy = RetryPolicy(max_retries=30, first_wait=0.01, longest_wait=0.05)
    server = UnreliableServer(seed=11, too_long=too_long, failing=failing)
    with listening(server) as url:
        async with AsyncSummarizer(url, retry=policy, attempt_timeout=ATTEMPT_SECONDS) as summarizer:
            each = summarizer.summarize_each(texts, return_errors=True)
            answers = [answer async for answer in each]
    by_text = dict(zip(texts, answers, strict=True))
    errors = {text: answer for text, answer in by_text.items() if isinstance(answer, ClientError)}
    assert all(isinstance(errors.pop(text), InputTooLong) for text in too_long)
    assert all(isinstance(errors.pop(text), EngineFailed) for text in failing)
    # A 500 without a name is not tried again unless the caller says so.
    assert {error.status for error in errors.values()} <= {500}
    good = [text for text in texts if not isinstance(by_text[text], ClientError)]
    assert [vars(by_text[text])["summary_text"] for text in good] == [text[::-1] for text in good]
    assert server.answered == Counter(good)
    assert server.repeated == server.early == []
