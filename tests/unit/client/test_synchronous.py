"""The client without await does what the other does, anywhere, and leaves nothing running."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from app.client import AsyncSummarizer, ClientError, Delta, InputTooLong, Summarizer, Summary
from tests.shipped import ROOT
from tests.unit.client.stub import AT_ONCE, Stub, item, stream

TEXTS = [f"text {i}" for i in range(10)]
SUMMARIES = [text.upper() for text in TEXTS]


def client(stub: Stub, max_concurrency: int = 4) -> Summarizer:
    return Summarizer("http://stub", retry=AT_ONCE, transport=stub, max_concurrency=max_concurrency)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "precis-client"]


def program(code: str) -> tuple[str, str, int]:
    """What a program prints on either stream, and its exit status."""
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    return done.stdout, done.stderr, done.returncode


def test_every_call_is_there() -> None:
    calls = {name for name in vars(AsyncSummarizer) if not name.startswith("_")}
    assert {name.replace("aclose", "close") for name in calls} == {n for n in vars(Summarizer) if not n.startswith("_")}


def test_calls_answer_as_the_asynchronous_ones() -> None:
    counts: list[int] = []
    events = (("delta", {"index": 0, "text": "A "}), ("result", item("a")))
    stub = Stub(stream(*events), stream(*events))
    with client(stub) as summarizer:
        for parts in (summarizer.stream("a"), summarizer.stream_many(["a"])):
            delta, last = parts
            assert isinstance(delta, Delta)
            assert isinstance(last, Summary)
        assert summarizer.summarize("a").summary_text == "A"
        assert [s.summary_text for s in summarizer.summarize_many(iter(TEXTS), progress=counts.append)] == SUMMARIES
        assert [s.summary_text for s in summarizer.summarize_each(TEXTS)] == SUMMARIES
        assert summarizer.tokenize("abc").tokens == 3
        assert [count.tokens for count in summarizer.tokenize_many(["a", "bb"])] == [1, 2]
        assert summarizer.info().model_id == "stub"
        assert repr(summarizer) == "Summarizer(URL('http://stub'))"
    assert sum(counts) == len(TEXTS)
    assert threads() == []


def test_the_priority_goes_along() -> None:
    stub = Stub(stream(("result", item("a"))), stream(("result", item("a"))))
    with client(stub) as summarizer:
        list(summarizer.stream("a", priority="batch"))
        list(summarizer.stream_many(["a"], priority="batch"))
        summarizer.summarize("a", priority="batch")
        for return_errors in (True, False):
            summarizer.summarize_many(TEXTS, priority="batch", return_errors=return_errors)
            list(summarizer.summarize_each(TEXTS, priority="batch", return_errors=return_errors))
    sent = [request.headers.get("x-priority") for request in stub.requests if request.url.path == "/summarize"]
    assert set(sent) == {"batch"}
    assert len(sent) == 3 + 4 * 3


def test_errors_are_raised_or_returned() -> None:
    stub = Stub()
    stub.bad = {"text 3"}
    with client(stub) as summarizer:
        with pytest.raises(InputTooLong):
            summarizer.summarize_many(TEXTS)
        for answers in (
            summarizer.summarize_many(TEXTS, return_errors=True),
            list(summarizer.summarize_each(TEXTS, return_errors=True)),
        ):
            assert [i for i, answer in enumerate(answers) if isinstance(answer, ClientError)] == [3]
        with pytest.raises(TypeError):
            summarizer.summarize_many("a text")


@pytest.mark.anyio
async def test_it_works_where_a_loop_is_running_as_in_a_notebook() -> None:
    with client(Stub()) as summarizer:
        assert summarizer.summarize("a").summary_text == "A"


def test_threads_may_share_one() -> None:
    stub = Stub()
    stub.seconds = 0.005
    with client(stub) as summarizer, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: summarizer.summarize(text).summary_text, TEXTS * 5))
    assert found == SUMMARIES * 5
    assert stub.most_running <= 4


def test_leaving_early_drops_the_rest() -> None:
    stub = Stub(max_batch_size=1)
    stub.seconds = 0.02
    many = TEXTS * 10  # a second's work, of which one stays
    with client(stub, max_concurrency=2) as summarizer:
        for summary in summarizer.summarize_each(many):
            assert summary.summary_text == "TEXT 0"
            break
        asked = len(stub.requests)
        time.sleep(0.1)
    assert len(stub.requests) == asked < len(many)


@pytest.mark.parametrize("call", ["summarize_many", "summarize_each"])
def test_ctrl_c_ends_the_call_and_its_requests(call: str) -> None:
    stub, main = Stub(), threading.main_thread().ident
    assert main is not None

    def press() -> None:
        until = time.monotonic() + 20
        while not stub.running and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)  # the caller waits by now
        signal.pthread_kill(main, signal.SIGINT)

    with client(stub) as summarizer, ThreadPoolExecutor(1) as pool:
        summarizer.info()
        stub.seconds = 60
        # Whatever started the tests may have had it ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            pressed = pool.submit(press)
            with pytest.raises(KeyboardInterrupt):
                list(getattr(summarizer, call)(TEXTS))
            pressed.result()
        finally:
            signal.signal(signal.SIGINT, before)
        assert stub.running == 0
        assert stub.cancelled > 0
        stub.seconds = 0
        assert summarizer.summarize("a").summary_text == "A"


def test_a_forked_process_gets_an_error_instead_of_waiting_for_ever_and_ends() -> None:
    code = (
        "import os\nfrom app.client import Summarizer\nfrom tests.unit.client.stub import Stub\n"
        "summarizer = Summarizer('http://stub', transport=Stub())\n"
        "if os.fork() == 0:\n"
        "    try:\n        summarizer.summarize('a')\n    except RuntimeError as error:\n        print(error)\n"
        "else:\n    os.wait()\n    print(summarizer.summarize('a').summary_text)\n"
    )
    assert program(code) == ("this Summarizer was made before a fork; make one in each process\nA\n", "", 0)


def test_a_closed_client_says_so() -> None:
    summarizer = client(Stub())
    summarizer.close()
    summarizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        summarizer.summarize("a")


def test_an_iterator_may_outlive_its_client(caplog: pytest.LogCaptureFixture) -> None:
    stub = Stub(max_batch_size=1)
    with client(stub) as summarizer:
        answers = summarizer.summarize_each(TEXTS)
        next(answers)
    asked = len(stub.requests)
    with pytest.raises(RuntimeError, match="closed"):
        next(answers)
    assert len(stub.requests) == asked
    assert caplog.records == []
    assert threads() == []


@pytest.mark.parametrize("last", ["", "answers = summarizer.summarize_each(['a'] * 99)\nnext(answers)\n"])
def test_a_program_ends_though_a_client_and_an_iterator_are_left_open(last: str) -> None:
    code = (
        "from app.client import Summarizer\nfrom tests.unit.client.stub import Stub\n"
        "summarizer = Summarizer('http://stub', transport=Stub())\n"
        "print(summarizer.summarize('a').summary_text)\n"
    )
    assert program(code + last) == ("A\n", "", 0)


def test_closing_ends_what_other_threads_ask() -> None:
    stub = Stub()
    stub.seconds = 60
    with ThreadPoolExecutor(1) as pool:
        with client(stub) as summarizer:
            asked = pool.submit(summarizer.summarize, "a")
            while not stub.requests:
                time.sleep(0.01)
        with pytest.raises(CancelledError):
            asked.result()
    assert stub.running == 0
