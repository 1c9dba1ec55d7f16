"""What a stranger meets: Hugging Face's client, the printed curl line, errors, and a clean end."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.e2e.conftest import Server, start_server, until
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

# Of a request that is not done before its caller, or the server, leaves.
LONG = {"min_new_tokens": 120, "max_new_tokens": 120}


def summarize(server: Server, inputs: str | list[str], **parameters: object) -> httpx.Response:
    return server.client.post("/summarize", json={"inputs": inputs, "parameters": parameters}, timeout=120)


def test_hugging_face_client(server: Server) -> None:
    client = InferenceClient(model=f"{server.url}/summarize", token="hf_not_a_token")
    result = client.summarization(CONVERSATIONS[0], generate_parameters={"num_beams": 2}, truncation="only_first")
    assert result.summary_text
    assert vars(result)["finish_reason"] in ("eos", "length")  # the client keeps keys that it does not know


def test_hugging_face_client_shows_the_errors_own_words(server: Server) -> None:
    client = InferenceClient(model=f"{server.url}/summarize")
    with pytest.raises(HfHubHTTPError, match=r"the limit is 512 \(2 of them special tokens\)"):
        client.summarization("word " * 600)


def test_the_printed_line_works_as_it_stands(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    line = next(line for line in server.log.read_text().splitlines() if line.strip().startswith("curl "))
    reply = subprocess.run([*shlex.split(line), "-s"], capture_output=True, check=True).stdout
    assert json.loads(reply)[0]["summary_text"]


def test_a_text_gets_the_same_summary_alone_and_in_company(server: Server) -> None:
    alone = [summarize(server, text).json()[0] for text in CONVERSATIONS]
    batch = summarize(server, list(CONVERSATIONS)).json()
    with ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
        together = list(pool.map(lambda text: summarize(server, text).json()[0], CONVERSATIONS))
    texts = [item["summary_text"] for item in alone]
    assert [item["summary_text"] for item in batch] == texts
    assert [item["summary_text"] for item in together] == texts


def test_the_count_before_is_the_count_after(server: Server) -> None:
    text = "A rather long story about nothing. " * 200
    count = server.client.post("/tokenize", json={"inputs": text}).json()[0]
    assert summarize(server, text).json()["errors"][0]["tokens"] == count["tokens"]
    fitting = summarize(server, text[: count["cut_at_char"]], max_new_tokens=2, num_beams=1)
    assert fitting.json()[0]["input_tokens"] == count["limit"]
    cut = summarize(server, text, overflow="truncate_tail", max_new_tokens=2, num_beams=1)
    assert cut.json()[0]["source_tokens"] == count["tokens"]
    assert cut.headers["x-hf-warning"].startswith("truncation; inputs cut")


def test_a_caller_that_leaves_frees_its_slots(server: Server) -> None:
    before = server.metric("precis_cancelled_total")
    texts = list(CONVERSATIONS) * 4
    body = json.dumps({"inputs": texts, "parameters": {"num_beams": 8, **LONG}})
    url = httpx.URL(server.url)
    with closing(HTTPConnection(url.host, url.port)) as caller:
        caller.request("POST", "/summarize", body, {"Content-Type": "application/json"})
        until(lambda: server.metric("precis_running"))
    until(lambda: server.metric("precis_cancelled_total") >= before + len(texts))
    until(lambda: server.metric("precis_running") == server.metric("precis_admitted_tokens") == 0)
    assert summarize(server, "hello", max_new_tokens=2).status_code == 200


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"num_beams": 1, "do_sample": True, "seed": 3}])
def test_streamed_parts_are_the_plain_summary(server: Server, options: dict[str, Any]) -> None:
    plain = summarize(server, list(CONVERSATIONS), **options).json()
    body = {"inputs": list(CONVERSATIONS), "parameters": options, "stream": True}
    with server.client.stream("POST", "/summarize", json=body) as reply:
        found = list(events(reply.iter_lines()))
    for index, item in enumerate(plain):
        parts = [data["text"] for name, data in found if name == "delta" and data["index"] == index]
        assert "".join(parts) == item["summary_text"]
        assert {"index": index, **item} in [data for name, data in found if name == "result"]
    assert found[-1] == ("done", {})


def test_a_caller_that_leaves_a_stream_frees_its_slot(server: Server) -> None:
    before = server.metric("precis_cancelled_total")
    texts = list(CONVERSATIONS) * 4
    body = {"inputs": texts, "parameters": {"num_beams": 1, **LONG}, "stream": True}
    with server.client.stream("POST", "/summarize", json=body) as reply:
        assert next(events(reply.iter_lines()))[0] == "delta"
    until(lambda: server.metric("precis_cancelled_total") >= before + len(texts))
    until(lambda: server.metric("precis_running") == server.metric("precis_admitted_tokens") == 0)


def test_sigterm_turns_ready_to_503_finishes_the_work_and_exits_0(checkpoint: Path, tmp_path: Path) -> None:
    with start_server(tmp_path / "log", model=checkpoint, drain_delay=2) as server, ThreadPoolExecutor(2) as pool:
        assert server.client.get("/health/ready").status_code == 200
        reply = pool.submit(summarize, server, list(CONVERSATIONS), num_beams=4, **LONG)
        until(lambda: server.metric("precis_admitted_tokens"))
        left = pool.submit(server.stop)
        until(lambda: server.client.get("/health/ready").status_code == 503)
        assert server.client.get("/health/live").status_code == 200
        assert reply.result().status_code == 200
        assert left.result() == 0
    assert CONVERSATIONS[0][:20] not in (tmp_path / "log").read_text()
