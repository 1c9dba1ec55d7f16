"""The examples of docs/api.md: read, run against the real server, compared with what is written, and written anew.

    python -m tests.e2e.api_examples --write

An example is a block of `sh` and behind it a block of `http`, its reply. A comment before it, such as
`<!-- server: rate_limit=2/hour busy -->`, names the settings of the server that it needs, and what is going on there
(`busy`: another request is being answered; `draining`: it was told to stop). Examples with equal settings share one
server, in the order of the document. Knows curl and Markdown. Does not know what a reply should say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Server, start_server, until
from tests.shipped import ROOT

PAGE = ROOT / "docs" / "api.md"
URL = "http://127.0.0.1:8000"
SETTINGS = {"device": "cpu", "dtype": "float32"}  # what is promised to give the same tokens everywhere
WIDTH = 118
CURL_SECONDS = 60

_LINES = r"(?:(?!```).*\n)*"
_EXAMPLE = re.compile(rf"(?:^<!-- server: (.*) -->\n)?^```sh\n({_LINES})```\n\n```http\n({_LINES})```$", re.MULTILINE)
# Of a reply's headers; `curl -i` shows all.
_TELLING = (
    "content-type",
    "allow",
    "www-authenticate",
    "retry-after",
    "ratelimit",
    "ratelimit-policy",
    "x-hf-warning",
)
# What differs from run to run, and what stands for it when replies are compared.
_VOLATILE = (
    (re.compile(r"\burn:request:[0-9a-f]{32}$"), "<id>"),
    (re.compile(r"^[0-9a-f]{64}$"), "<hash>"),
    (re.compile(r"^\d+(\.\d+)+(\+\w+)?$"), "<version>"),
    (re.compile(r"\bin \d+ s\b"), "in <n> s"),
)
_VOLATILE_HEADERS = {
    "date": re.compile(r"^\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT$"),
    "content-length": re.compile(r"^\d+$"),
    "x-request-id": re.compile(r"^[0-9a-f]{32}$"),
    "retry-after": re.compile(r"^\d+$"),
    "ratelimit": re.compile(r"(?<=;t=)\d+$"),
    **{f"x-{name}-time": re.compile(r"^\d+$") for name in ("total", "compute", "tokenization", "queue", "inference")},
}
_NUMBER_AT_THE_END = re.compile(r"(?<= )[-+.\de]+$", re.MULTILINE)
_SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Example:
    """One command and the reply that the page has for it.

    Attributes:
        settings: of the server, beside `SETTINGS`.
        moment: "busy", "draining", or nothing.
        begin, end: of the reply in the page, in characters.
    """

    settings: tuple[tuple[str, str], ...]
    moment: str
    command: str
    reply: str
    begin: int
    end: int


def examples(page: str) -> list[Example]:
    """Every example of a page, in its order."""
    found = []
    for match in _EXAMPLE.finditer(page):
        words = (match[1] or "").split()
        settings = tuple((name, value) for name, sign, value in (word.partition("=") for word in words) if sign)
        moment = " ".join(word for word in words if "=" not in word)
        found.append(Example(settings, moment, match[2], match[3], match.start(3), match.end(3)))
    return found


def replies(listed: Sequence[Example], folder: Path) -> list[str]:
    """What real servers answer, as the page would have it; in `folder` are logs and curl's headers."""
    groups: dict[tuple[tuple[str, str], ...], list[Example]] = {}
    for example in listed:
        groups.setdefault(example.settings, []).append(example)
    with ThreadPoolExecutor(2) as pool:  # most of the time goes into starts, on one core each
        folders = [folder / str(number) for number in range(len(groups))]
        answered = dict(zip(groups, map(iter, pool.map(_replies_of_one, groups.values(), folders)), strict=True))
    return [next(answered[example.settings]) for example in listed]


def canonical(reply: str, approximate: bool = False) -> Any:
    """A reply without what differs from run to run; two are the same if these are equal.

    Args:
        approximate: make fractions equal to what is within `_SCORE_TOLERANCE` of them. For one side of a comparison.
    """
    head, _, body = reply.partition("\n\n")
    status, *lines = head.splitlines() or [""]
    status = " ".join(status.split()[:2])  # the phrase behind it is Python's, and changes with its version
    shown = [_masked_header(*line.partition(": ")[::2]) for line in lines]
    try:
        is_stream = "text/event-stream" in head
        content = _events(body, approximate) if is_stream else _masked(json.loads(body), approximate)
    except (ValueError, KeyError):  # a page that a hand has changed may hold anything
        content = _NUMBER_AT_THE_END.sub("<n>", body)
    return status, shown, content


def write(page: str, answered: Sequence[str]) -> str:
    """The page with each reply that has changed replaced."""
    for example, reply in reversed(list(zip(examples(page), answered, strict=True))):
        if canonical(example.reply, approximate=True) != canonical(reply):
            page = page[: example.begin] + reply + page[example.end :]
    return page


def fold(value: Any, indent: int = 0) -> str:
    """JSON for reading: what fits stays on its line."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + len(line) <= WIDTH or not isinstance(value, (dict, list)) or not value:
        return line
    blank = " " * (indent + 2)
    if isinstance(value, list):
        items = [blank + fold(item, indent + 2) for item in value]
    else:
        items = [f"{blank}{json.dumps(key)}: {fold(item, indent + 2)}" for key, item in value.items()]
    begin, end = "[]" if isinstance(value, list) else "{}"
    return begin + "\n" + ",\n".join(items) + "\n" + " " * indent + end


def _replies_of_one(group: Sequence[Example], folder: Path) -> list[str]:
    """What one server answers to examples that have its settings."""
    folder.mkdir()
    answered = []
    with start_server(folder / "log", **SETTINGS, **dict(group[0].settings), port=_free_port()) as server:
        for example in group:
            with _moment(example.moment, server):
                answered.append(_reply(example.command, server.url, folder))
    return answered


def _reply(command: str, url: str, folder: Path) -> str:
    """Run a command as it stands, but for the port; what curl says of the headers is written aside by its settings."""
    headers = folder / "headers"
    (folder / ".curlrc").write_text(f'dump-header = "{headers}"\nmax-time = {CURL_SECONDS}\n')
    environment = os.environ | {"CURL_HOME": str(folder), "no_proxy": "*"}
    done = subprocess.run(["bash", "-c", command.replace(URL, url)], env=environment, capture_output=True, check=True)
    dumped = headers.read_bytes()
    body = done.stdout.removeprefix(dumped)
    last = dumped.decode().replace("\r\n", "\n").strip().rpartition("\n\n")[2]  # after a "100 Continue"
    status, *lines = last.splitlines()
    if body == done.stdout:  # curl without -i
        lines = [line for line in lines if line.partition(":")[0] in _TELLING]
    text = body.decode().replace(f'"port":{httpx.URL(url).port}', f'"port":{httpx.URL(URL).port}')
    try:
        text = fold(json.loads(text))
    except json.JSONDecodeError:
        text = text.strip("\n")
    return "\n".join([status.strip(), *lines]) + f"\n\n{text}\n"


@contextmanager
def _moment(moment: str, server: Server) -> Iterator[None]:
    """Run while the server is in a state that no setting brings about."""
    if moment == "draining":
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.client.get("/health").status_code == 503)
    if moment != "busy":
        yield
        return
    long = {"num_beams": 8, "min_new_tokens": 126, "max_new_tokens": 127}
    body = {"inputs": ["Anna: Are you there?"] * 2, "parameters": long}
    other = Thread(target=lambda: server.client.post("/summarize", json=body))
    other.start()
    try:
        until(lambda: server.metric("precis_admitted_tokens"))
        yield
    finally:
        other.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _masked_header(name: str, value: str) -> tuple[str, str]:
    return name, _VOLATILE_HEADERS[name].sub("<n>", value) if name in _VOLATILE_HEADERS else value


def _masked(value: Any, approximate: bool) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item, approximate) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, approximate) for item in value]
    if isinstance(value, float) and approximate:
        return pytest.approx(value, abs=_SCORE_TOLERANCE)
    if isinstance(value, str):
        for pattern, name in _VOLATILE:
            value = pattern.sub(name, value)
    return value


def _events(body: str, approximate: bool) -> Any:
    """The pieces of each text put together, for it is the step's business where they are cut; then the other events."""
    pieces: dict[int, str] = {}
    others = []
    for block in body.split("\n\n"):
        if not block.strip() or block.startswith(":"):
            continue
        lines = dict(line.split(": ", 1) for line in block.strip().split("\n"))
        data = json.loads(lines["data"])
        if lines["event"] == "delta":
            pieces[data["index"]] = pieces.get(data["index"], "") + data["text"]
        else:
            others.append((lines["event"], _masked(data, approximate)))
    others.sort(key=lambda event: (event[0] != "result", event[1].get("index", 0)))
    return pieces, others


def main() -> None:
    """Print what has changed, or write it."""
    parser = argparse.ArgumentParser(description="Replies of docs/api.md, made by the real server.")
    parser.add_argument("--write", action="store_true", help="write those that have changed")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    listed = examples(page)
    with tempfile.TemporaryDirectory() as folder:
        answered = replies(listed, Path(folder))
    for example, reply in zip(listed, answered, strict=True):
        if canonical(example.reply, approximate=True) != canonical(reply):
            print(f"{example.command}\n{reply}")
    if arguments.write:
        PAGE.write_text(write(page, answered), encoding="utf-8")


if __name__ == "__main__":
    main()
