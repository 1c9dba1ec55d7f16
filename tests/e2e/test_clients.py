"""Clients as users run them, against the real server: Hugging Face's in Python and JavaScript, Triton's, platforms.

How each shows every error that there is stands in `tests/integration/test_clients.py`, with a fake engine.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient

from tests.e2e.conftest import Server, start_server
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

NODE = Path(__file__).parent / "node"
LONG = "word " * 600
OPTIONS = {"num_beams": 2, "max_new_tokens": 12}
OFFLINE = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|\w+_TIMEOUT\b|EIDLETIMEOUT|code E5\d\d")
NPM_SECONDS = 120


@pytest.fixture(scope="module")
def summaries(server: Server) -> list[str]:
    """What `POST /summarize` says of the conversations."""
    body = {"inputs": list(CONVERSATIONS), "parameters": OPTIONS}
    return [item["summary_text"] for item in server.client.post("/summarize", json=body, timeout=120).json()]


# Hugging Face, Python


def test_hugging_face_in_python_says_what_summarize_says(server: Server, summaries: list[str]) -> None:
    client = InferenceClient(model=f"{server.url}/summarize")
    said = [client.summarization(text, generate_parameters=OPTIONS).summary_text for text in CONVERSATIONS]
    assert said == summaries


def test_hugging_face_in_python_warns_of_a_cut(server: Server) -> None:
    """In a process of its own: the client warns once in a process."""
    script = f"""
from huggingface_hub import InferenceClient
client = InferenceClient(model="{server.url}/summarize")
print(client.summarization("{LONG}", truncation="only_first", generate_parameters={OPTIONS}).truncated)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert "inputs cut to 512 tokens" in done.stderr


def test_hugging_faces_helpers(server: Server) -> None:
    client = InferenceClient(model=f"{server.url}/summarize", provider="hf-inference")
    assert client.health_check()
    assert client.get_endpoint_info()["task"] == "summarization"


# Hugging Face, JavaScript


@pytest.fixture(scope="module")
def node() -> str:
    """Node, with what package-lock.json names installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no node and npm on this machine")
    installed = NODE / "node_modules" / ".package-lock.json"
    if not installed.is_file() or installed.stat().st_mtime < (NODE / "package-lock.json").stat().st_mtime:
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=20000"]
        try:
            done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm has not got its packages in {NPM_SECONDS} s")
        if done.returncode and (found := OFFLINE.search(done.stderr)):
            pytest.skip(f"npm does not reach its registry: {found[0]}")
        assert done.returncode == 0, done.stderr
    return node


def test_hugging_face_in_javascript(node: str, server: Server, summaries: list[str]) -> None:
    requests: list[dict[str, Any]] = [{"inputs": text, "parameters": OPTIONS} for text in CONVERSATIONS]
    requests += [{"inputs": LONG}, {"inputs": "a", "parameters": {"num_beams": 0}}]
    command = [node, "summarize.mjs", f"{server.url}/summarize"]
    done = subprocess.run(
        command, cwd=NODE, input=json.dumps(requests), capture_output=True, text=True, check=True, timeout=120
    )
    *answered, too_long, invalid = json.loads(done.stdout)
    assert [outcome["output"]["summary_text"] for outcome in answered] == summaries
    assert too_long["status"] == 413
    assert "the limit is 512 (2 of them special tokens)" in too_long["error"]
    assert invalid["status"] == 422
    assert "/parameters/num_beams: Input should be greater than or equal to 1" in invalid["error"]


# Open Inference


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_says_what_summarize_says(server: Server, summaries: list[str], binary: bool) -> None:
    texts = np.array(CONVERSATIONS, dtype=np.object_)
    tensor = triton.InferInput("text", [len(texts)], "BYTES").set_data_from_numpy(texts, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("summary_text", "score")]
    with triton.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=120) as client:
        assert client.is_server_ready()
        name = server.client.get("/v1/models").json()["models"][0]
        model = client.get_model_metadata(name)
        result = client.infer(
            name, [tensor], model["versions"][0], outputs=outputs, request_id="42", parameters=dict(OPTIONS)
        )
        assert result.get_response()["id"] == "42"
        said = [value.decode() if isinstance(value, bytes) else value for value in result.as_numpy("summary_text")]
        assert said == summaries
        assert result.as_numpy("score").dtype == np.float32
        with pytest.raises(triton.InferenceServerException, match=r"inputs\[0\]\.data\[0\] is 602 tokens"):
            client.infer(name, [triton.InferInput("text", [1], "BYTES").set_data_from_numpy(np.array([LONG], object))])


# Platforms


def test_every_platform_says_what_summarize_says(server: Server, summaries: list[str]) -> None:
    name = server.client.get("/v1/models").json()["models"][0]
    as_inputs = {"inputs": list(CONVERSATIONS), "parameters": OPTIONS}
    as_instances = {"instances": list(CONVERSATIONS), "parameters": OPTIONS}
    for path, body in (
        ("/invocations", as_inputs),
        ("/score", as_inputs),
        ("/predict", as_instances),
        (f"/v1/models/{name}:predict", as_instances),
    ):
        reply = server.client.post(path, json=body, timeout=120).json()
        items = reply["predictions"] if isinstance(reply, dict) else reply
        assert [item["summary_text"] for item in items] == summaries, path


def test_started_as_sagemaker_starts_it(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "0")
    with start_server(tmp_path / "log", "app serve", model=checkpoint, port=1) as server:
        assert server.client.get("/ping").status_code == 200
        assert server.stop() == 0


def test_started_as_vertex_starts_it(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "/v1/endpoints/7/deployedModels/8"
    variables = {"HTTP_PORT": "0", "HEALTH_ROUTE": names, "PREDICT_ROUTE": f"{names}:predict"}
    for name, value in {**variables, "STORAGE_URI": str(checkpoint)}.items():
        monkeypatch.setenv(f"AIP_{name}", value)
    with start_server(tmp_path / "log", port=1) as server:
        assert server.client.get(names).status_code == 200
        body = {"instances": [{"inputs": CONVERSATIONS[0]}], "parameters": OPTIONS}
        reply = server.client.post(f"{names}:predict", json=body, timeout=120)
        assert reply.json()["predictions"][0]["finish_reason"] in ("eos", "length")
    monkeypatch.setenv("AIP_STORAGE_URI", "gs://bucket/model")
    with (
        pytest.raises(AssertionError, match="error: AIP_STORAGE_URI is gs://bucket/model"),
        start_server(tmp_path / "refused"),
    ):
        pass
