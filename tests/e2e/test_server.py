"""What a stranger meets: Hugging Face's client, the printed curl line, errors, and a clean end."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.e2e.conftest import Server, start_server
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e


def summarize(server: Server, inputs: str | list[str], **parameters: object) -> httpx.Response:
    return httpx.post(f"{server.url}/summarize", json={"inputs": inputs, "parameters": parameters}, timeout=120)


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
    count = httpx.post(f"{server.url}/tokenize", json={"inputs": text}).json()[0]
    assert summarize(server, text).json()["errors"][0]["tokens"] == count["tokens"]
    fitting = summarize(server, text[: count["cut_at_char"]], max_new_tokens=2, num_beams=1)
    assert fitting.json()[0]["input_tokens"] == count["limit"]
    cut = summarize(server, text, overflow="truncate_tail", max_new_tokens=2, num_beams=1)
    assert cut.json()[0]["source_tokens"] == count["tokens"]
    assert cut.headers["x-hf-warning"].startswith("truncation; inputs cut")


def test_a_caller_that_leaves_frees_its_slots(server: Server) -> None:
    before = server.metric("precis_cancelled_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/summarize",
            json={"inputs": list(CONVERSATIONS) * 4, "parameters": {"num_beams": 8}},
            timeout=0.2,
        )
    until = time.monotonic() + 30
    while time.monotonic() < until and server.metric("precis_cancelled_total") < before + 1:
        time.sleep(0.1)
    assert server.metric("precis_cancelled_total") > before
    assert server.metric("precis_admitted_tokens") == 0
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
    with httpx.stream("POST", f"{server.url}/summarize", json=body, timeout=60) as reply:
        found = list(events(reply.iter_lines()))
    for index, item in enumerate(plain):
        parts = [data["text"] for name, data in found if name == "delta" and data["index"] == index]
        assert "".join(parts) == item["summary_text"]
        assert {"index": index, **item} in [data for name, data in found if name == "result"]
    assert found[-1] == ("done", {})


def test_a_caller_that_leaves_a_stream_frees_its_slot(server: Server) -> None:
    before = server.metric("precis_cancelled_total")
    body = {
        "inputs": CONVERSATIONS[0],
        "parameters": {"num_beams": 1, "min_new_tokens": 120, "max_new_tokens": 127},
        "stream": True,
    }
    with httpx.stream("POST", f"{server.url}/summarize", json=body, timeout=60) as reply:
        assert next(events(reply.iter_lines()))[0] == "delta"
    until = time.monotonic() + 10
    while time.monotonic() < until and server.metric("precis_running") + server.metric("precis_admitted_tokens"):
        time.sleep(0.05)
    assert server.metric("precis_cancelled_total") == before + 1
    assert server.metric("precis_admitted_tokens") == 0


def test_an_address_that_others_reach_needs_keys(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"error: PRECIS_HOST is 0\.0\.0\.0, which others can reach"),
        start_server(tmp_path / "log", host="0.0.0.0"),
    ):
        pass


def test_sigterm_turns_ready_to_503_finishes_the_work_and_exits_0(checkpoint: Path, tmp_path: Path) -> None:
    with start_server(tmp_path / "log", model=checkpoint, drain_delay=4) as server, ThreadPoolExecutor(2) as pool:
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        reply = pool.submit(summarize, server, list(CONVERSATIONS), num_beams=4)
        while server.metric("precis_admitted_tokens") == 0 and not reply.done():
            time.sleep(0.01)
        left = pool.submit(server.stop)
        while httpx.get(f"{server.url}/health/ready").status_code == 200:
            time.sleep(0.05)
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert reply.result().status_code == 200
        assert left.result() == 0
    assert CONVERSATIONS[0][:20] not in (tmp_path / "log").read_text()


def test_a_changed_file_is_not_served(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "changed" / "1"
    folder.mkdir(parents=True)
    for file in checkpoint.resolve().iterdir():
        (folder / file.name).symlink_to(file.resolve())
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_bytes(tokenizer.replace(b"a", b"b", 1))
    with (
        pytest.raises(AssertionError, match=r"error: .*tokenizer.json has sha256"),
        start_server(tmp_path / "log", model_store=tmp_path / "store"),
    ):
        pass


def test_a_wrong_setting_is_told_by_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="error: PRECIS_MAX_NUM_BEAMS: Input should be greater than"),
        start_server(tmp_path / "log", max_num_beams=0),
    ):
        pass
