"""Real clients over a real socket: whatever error the server gives, the client shows its words and its status.

The engine is the fake, so that it can fail in every way. `tests/e2e/test_clients.py` has the same clients with a model.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
import uvicorn
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError

from app.errors import PrecisError, QueueFull, RateLimited
from app.exception_handlers import REPLIES
from app.main import create_app
from app.runtime import Runtime
from tests.service import FakeEngine, load_fake, read_settings

TOLD = "told in these words, with 7 of 5"
# Every error that a caller can be sent, by the class that the service raises.
ERRORS: list[PrecisError] = [
    kind(TOLD, 7) if kind in (QueueFull, RateLimited) else kind(TOLD)
    for kind in REPLIES
    if issubclass(kind, PrecisError)
]


@dataclass
class Listening:
    """A server in a thread, and the handles that tests pull."""

    address: str
    engine: FakeEngine
    runtime: Runtime

    @property
    def url(self) -> str:
        return f"http://{self.address}"


@contextmanager
def listening() -> Iterator[Listening]:
    """Run until the block ends."""
    engine = FakeEngine()
    app = create_app(read_settings(), lambda settings, metrics: load_fake(settings, metrics, engine))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.001)
        yield Listening(f"127.0.0.1:{listener.getsockname()[1]}", engine, app.state.runtime)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Listening]:
    with listening() as running:
        yield running


@pytest.fixture
def failing(server: Listening, request: pytest.FixtureRequest) -> Iterator[PrecisError]:
    """The server gives this error while the test runs."""
    assert isinstance(request.param, PrecisError)
    server.engine.error = request.param
    yield request.param
    server.engine.error = None


def status_of(error: PrecisError) -> int:
    return next(REPLIES[kind].status for kind in type(error).__mro__ if kind in REPLIES)


every_error = pytest.mark.parametrize("failing", ERRORS, indirect=True, ids=lambda error: type(error).__name__)


def text(*values: str) -> list[triton.InferInput]:
    array = np.array(values, dtype=np.object_)
    return [triton.InferInput("text", list(array.shape), "BYTES").set_data_from_numpy(array)]


@every_error
def test_hugging_faces_client_shows_every_error(server: Listening, failing: PrecisError) -> None:
    with pytest.raises(HfHubHTTPError, match=TOLD) as caught:
        InferenceClient(model=f"{server.url}/summarize", token="hf_not_a_token").summarization("hello")
    assert caught.value.response.status_code == status_of(failing)
    assert isinstance(caught.value, BadRequestError) is (status_of(failing) == 400)
    assert f"Request ID: {caught.value.response.headers['x-request-id']}" in str(caught.value)
    if isinstance(failing, (QueueFull, RateLimited)):
        assert caught.value.response.headers["retry-after"] == "7"


def test_hugging_faces_helpers_follow_the_server(server: Listening) -> None:
    # Without its provider's name the helpers refuse any URL.
    client = InferenceClient(model=f"{server.url}/summarize", provider="hf-inference")
    assert client.get_endpoint_info()["limits"]["max_input_tokens"] == 12
    assert client.health_check() is True
    server.engine.age = 1000.0
    assert client.health_check() is False
    server.engine.age = 0.0


@every_error
def test_tritons_client_shows_every_error(server: Listening, failing: PrecisError) -> None:
    with (
        triton.InferenceServerClient(server.address) as client,
        pytest.raises(triton.InferenceServerException) as caught,
    ):
        client.infer("fake", text("hello"))
    assert caught.value.message() == TOLD
    assert caught.value.status() == str(status_of(failing))


def test_tritons_client_shows_what_is_wrong_with_a_request(server: Listening) -> None:
    numbers = triton.InferInput("text", [1], "FP32").set_data_from_numpy(np.ones(1, dtype=np.float32))
    with triton.InferenceServerClient(server.address) as client:
        for inputs, name, words in (
            (text("a b c d e f g h i j k l m"), "fake", r"inputs\[0\]\.data\[0\] is 15 tokens; the limit is 12"),
            ([numbers], "fake", "/inputs/0/datatype: Input should be 'BYTES'"),
            (text("a"), "other", "There is no model 'other' here; this server has 'fake'"),
        ):
            with pytest.raises(triton.InferenceServerException, match=words):
                client.infer(name, inputs)


def test_tritons_helpers_follow_the_server(server: Listening) -> None:
    with triton.InferenceServerClient(server.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("fake", "1.0")
        assert not client.is_model_ready("fake", "2.0")
        server.runtime.draining = True
        assert not client.is_server_ready()
        assert not client.is_model_ready("fake")
        server.runtime.draining = False
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert client.get_model_metadata("fake")["inputs"][0]["name"] == "text"


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_asynchronous_client(server: Listening, binary: bool) -> None:
    """It declares every body as octets, JSON too."""

    async def infer() -> list[str]:
        array = np.array([["hello"], ["world"]], dtype=np.object_)
        tensor = triton.InferInput("text", [2, 1], "BYTES").set_data_from_numpy(array, binary_data=binary)
        output = triton.InferRequestedOutput("summary_text", binary_data=binary)
        async with triton_aio.InferenceServerClient(server.address) as client:
            result = await client.infer("fake", [tensor], outputs=[output], parameters={"num_beams": 2})
        values = result.as_numpy("summary_text")
        assert values.shape == (2, 1)
        return [value.decode() if isinstance(value, bytes) else value for value in values[:, 0]]

    assert asyncio.run(infer()) == ["hello", "world"]
