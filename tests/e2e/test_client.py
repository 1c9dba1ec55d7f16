"""The Python client against the real server, as README and docs/client.md show it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.client import ClientError, Delta, InputTooLong, RetryPolicy, StreamedSummary, Summarizer, Summary
from tests.e2e.conftest import Server, start_server
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

LONG = "word " * 600


@pytest.fixture
def summarizer(server: Server) -> Iterator[Summarizer]:
    with Summarizer(server.url, timeout=120) as client:
        yield client


def test_many_texts_get_the_summaries_that_each_gets_alone(summarizer: Summarizer) -> None:
    texts = [*CONVERSATIONS, LONG, *CONVERSATIONS] * 5  # more than one request takes
    assert len(texts) > summarizer.info().limits.max_batch_size
    alone = {text: summarizer.summarize(text, num_beams=2, max_new_tokens=12).summary_text for text in CONVERSATIONS}
    answers = summarizer.summarize_many(texts, return_errors=True, num_beams=2, max_new_tokens=12)
    for index, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if text == LONG:
            assert isinstance(answer, InputTooLong)
            assert answer.indices == (index,)
        else:
            assert isinstance(answer, Summary)
            assert answer.summary_text == alone[text]


def test_a_text_cut_where_the_server_says_is_taken(summarizer: Summarizer) -> None:
    count = summarizer.tokenize(LONG)
    with pytest.raises(ClientError) as caught:
        summarizer.summarize(LONG)
    assert caught.value.errors[0]["cut_at_char"] == count.cut_at_char
    assert summarizer.summarize(LONG[: count.cut_at_char], num_beams=1, max_new_tokens=2).input_tokens == count.limit


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_streams_pieces_are_the_summary_that_comes_without_it(summarizer: Summarizer, num_beams: int) -> None:
    whole = summarizer.summarize(CONVERSATIONS[0], num_beams=num_beams)
    *deltas, last = summarizer.stream(CONVERSATIONS[0], num_beams=num_beams)
    assert isinstance(last, Summary)
    written = "".join(delta.text for delta in deltas if isinstance(delta, Delta))
    assert written == last.summary_text == whole.summary_text
    assert num_beams > 1 or len(deltas) > 1  # several beams may be certain at the end only


def test_texts_streamed_together_are_written_as_each_is_alone(summarizer: Summarizer) -> None:
    plain = summarizer.summarize_many(CONVERSATIONS, num_beams=1)
    found = list(summarizer.stream_many(CONVERSATIONS, num_beams=1, priority="batch"))
    for index, summary in enumerate(plain):
        *deltas, last = [part for part in found if part.index == index]
        assert isinstance(last, StreamedSummary)
        written = "".join(delta.text for delta in deltas if isinstance(delta, Delta))
        assert written == last.summary_text == summary.summary_text
    first_end = next(at for at, part in enumerate(found) if isinstance(part, StreamedSummary))
    assert {part.index for part in found[:first_end]} == set(range(len(CONVERSATIONS)))  # side by side


def test_a_server_that_is_killed_and_started_again_in_the_middle_loses_no_text(
    checkpoint: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"model": checkpoint, "dtype": "float32", "port": port, "max_batch_size": 4}
    # Retries for more than two minutes: a start takes as long as the machine has other work.
    with Summarizer(f"http://127.0.0.1:{port}", retry=RetryPolicy(max_retries=1000, longest_wait=0.5)) as summarizer:
        with start_server(tmp_path / "first", **settings):
            answers = summarizer.summarize_each(CONVERSATIONS * 15, num_beams=1, min_new_tokens=8, max_new_tokens=8)
            found = [next(answers)]
        with start_server(tmp_path / "second", **settings):
            found += answers
    texts = [summary.summary_text for summary in found]
    assert texts == texts[: len(CONVERSATIONS)] * 15


def test_the_server_says_that_it_is_well(summarizer: Summarizer) -> None:
    assert summarizer.health().status == "ok"
