"""docs/api.md says what the real server answers, for every route and every error that a request can bring about."""

from __future__ import annotations

import re
import shutil

import pytest

from app.errors import PrecisError
from app.exception_handlers import REPLIES
from app.main import create_app
from tests.e2e.api_examples import PAGE, URL, Example, canonical, examples, replies, write
from tests.service import read_settings

pytestmark = pytest.mark.e2e

TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = examples(TEXT)
# No request alone brings these about.
FAULTS = {"generation-failed", "engine-stopped", "not-ready"}
FULL = """HTTP/1.1 429 Too Many Requests
retry-after: 3
x-request-id: 0123456789abcdef0123456789abcdef

{"detail": "Full; try again in 3 s.", "instance": "urn:request:0123456789abcdef0123456789abcdef", "errors": []}
"""
SUMMARY = 'HTTP/1.1 200 OK\n\n[{"summary_text": "a b", "score": -0.5003, "truncated": false}]\n'
EVENTS = (
    "HTTP/1.1 200 OK\ncontent-type: text/event-stream\n\n"
    'event: delta\ndata: {"index": 0, "text": "a"}\n\n'
    'event: delta\ndata: {"index": 0, "text": " b"}\n\n'
    'event: result\ndata: {"index": 0, "summary_text": "a b", "score": -0.5}\n\n'
    "event: done\ndata: {}\n"
)


def same(written: str, answered: str) -> bool:
    return bool(canonical(written, approximate=True) == canonical(answered))


def called(example: Example) -> tuple[str, str]:
    """Method and path of the last request of an example."""
    path = re.findall(rf"{URL}(/[^\s'?]*)", example.command)[-1]
    return ("POST" if re.search(r" -(d|T) ", example.command) else "GET"), path


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the servers answer to each example."""
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    return replies(EXAMPLES, tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=lambda index: " ".join(called(EXAMPLES[index])))
def test_the_reply_is_the_servers(answered: list[str], index: int) -> None:
    again = "made anew by: python -m tests.e2e.api_examples --write"
    assert canonical(EXAMPLES[index].reply, approximate=True) == canonical(answered[index]), again


def test_nothing_would_be_written_anew(answered: list[str]) -> None:
    assert write(TEXT, answered) == TEXT


def test_every_command_has_a_reply() -> None:
    assert len(EXAMPLES) == TEXT.count("```sh\n") == TEXT.count("```http\n")


def test_every_route_has_an_example() -> None:
    shown = {called(example) for example in EXAMPLES}
    app = create_app(read_settings())
    paths = app.openapi()["paths"]
    missing = []
    for path, methods in [*paths.items(), *((path, {"get": {}}) for path in ("/summarize/health", "/summarize/info"))]:
        pattern = re.compile(re.sub(r"\{\w+\}", r"[^/:]+", path) + "$")
        missing += [(m, path) for m in methods if not any(m.upper() == s and pattern.match(p) for s, p in shown)]
    assert paths
    assert missing == []
    assert {("POST", "/"), ("GET", "/docs"), ("GET", "/openapi.json")} <= shown


def test_every_error_is_in_the_table_and_has_an_example_where_a_request_brings_it_about() -> None:
    slugs = {reply.slug for kind, reply in REPLIES.items() if issubclass(kind, PrecisError)}
    table = set(re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| [45]\d\d \|.*$", TEXT, re.MULTILINE))))
    shown = set(re.findall(r'"type": "/problems/([a-z-]+)"', TEXT))
    assert slugs <= table
    assert shown <= table
    assert slugs - FAULTS <= shown


@pytest.mark.parametrize(
    ("reply", "now"),
    [
        (FULL, FULL.replace(" 3", " 17")),
        (FULL, FULL.replace("0123456789abcdef", "f" * 16)),
        (FULL, FULL.replace("Too Many Requests", "Another Phrase")),
        (SUMMARY, SUMMARY.replace("-0.5003", "-0.5001")),
        (EVENTS, EVENTS.replace('"a"', '"a "').replace('" b"', '"b"')),
        ("HTTP/1.1 200 OK\n\nprecis_texts_total 9.0\n", "HTTP/1.1 200 OK\n\nprecis_texts_total 1e+03\n"),
        ('HTTP/1.1 200 OK\n\n{"torch": "2.13.0+cpu"}\n', 'HTTP/1.1 200 OK\n\n{"torch": "2.13.1"}\n'),
    ],
)
def test_what_differs_from_run_to_run_is_no_difference(reply: str, now: str) -> None:
    assert reply != now
    assert same(reply, now)


@pytest.mark.parametrize(
    ("reply", "now"),
    [
        (FULL, FULL.replace("429", "503")),
        (FULL, FULL.replace("retry-after: 3\n", "")),
        (FULL, FULL.replace("retry-after: 3", "retry-after: soon")),
        (FULL, FULL.replace("Full", "Fool")),
        (FULL, FULL.replace(', "errors": []', "")),
        (FULL, FULL.replace("urn:request:0123456789abcdef0123456789abcdef", "urn:request:mine")),
        (SUMMARY, SUMMARY.replace("-0.5003", "-0.5103")),
        (SUMMARY, SUMMARY.replace("a b", "a c")),
        (SUMMARY, SUMMARY.replace("false", "true")),
        (SUMMARY, SUMMARY.replace("}]", "}")),
        (EVENTS, EVENTS.replace('" b"', '" c"')),
        (EVENTS, EVENTS.replace("event: done\ndata: {}\n", "")),
        (EVENTS, EVENTS.replace("-0.5", "-0.6")),
        ("HTTP/1.1 200 OK\n\nprecis_texts_total 9.0\n", "HTTP/1.1 200 OK\n\nprecis_text_total 9.0\n"),
    ],
)
def test_what_a_hand_has_changed_is_a_difference(reply: str, now: str) -> None:
    assert reply != now
    assert not same(now, reply)


@pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=lambda index: " ".join(called(EXAMPLES[index])))
def test_each_word_of_a_status_and_a_body_counts(index: int) -> None:
    reply = EXAMPLES[index].reply
    status = reply.split()[1]
    assert not same(reply.replace(status, "299", 1), reply)
    head, _, body = reply.partition("\n\n")
    word = re.search(r"[a-z]{2,}", body)
    assert word is not None
    assert not same(f"{head}\n\n{body[: word.start()]}x{body[word.start() :]}", reply)


def test_a_changed_reply_is_written_and_the_others_are_left() -> None:
    page = "\nText.\n\n".join(f"```sh\ncurl {URL}\n```\n\n```http\n{reply}```\n" for reply in (FULL, SUMMARY))
    changed = SUMMARY.replace("a b", "a c")
    assert write(page, [FULL.replace(" 3", " 17"), changed]) == page.replace(SUMMARY, changed)
