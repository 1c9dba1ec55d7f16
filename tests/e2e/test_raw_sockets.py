"""Bytes that no client library would send, on the real server: each gets its answer, and the next caller notices none.

Every shape of request below is one connection; what is expected is the status of every reply until the server closes.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, start_server, until
from tests.shipped import CONVERSATIONS

pytestmark = pytest.mark.e2e

HEADER_TIMEOUT = BODY_TIMEOUT = 0.4
MAX_BODY_BYTES = 200_000
ABORTED = 2000
SLOW = 200
DRIPS = 200  # bytes, a twentieth of a timeout apart: ten times as long as there is

BODY = b'{"inputs": "hello"}'
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def post(body: bytes = b"", *headers: bytes, path: bytes = b"/tokenize", version: bytes = b"1.1") -> bytes:
    """A request that says its length, unless `headers` say something about it, and closes."""
    lines = [b"POST " + path + b" HTTP/" + version, b"Host: x", b"Content-Type: application/json", b"Connection: close"]
    framed = any(header.lower().startswith((b"content-length", b"transfer-encoding")) for header in headers)
    lines += [*headers] if framed else [*headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(*headers: bytes, line: bytes = b"GET /health/live HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: x", b"Connection: close", *headers]) + b"\r\n\r\n"


def json_of(inputs: bytes = b'"hello"', options: bytes = b"{}") -> bytes:
    return b'{"inputs": ' + inputs + b', "parameters": {"generate_parameters": ' + options + b"}}"


CHUNKED = b"Transfer-Encoding: chunked"
SMUGGLED = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

# name -> (what is sent, the statuses of the replies)
SHAPES: dict[str, tuple[bytes, list[int]]] = {
    "a plain request": (post(BODY), [200]),
    # Framing
    "no length, so no body": (post(b"", b"Content-Length: 0"), [400]),
    "a length too short leaves rubbish": (
        post(BODY + b"\r\n\r\n", b"Content-Length: 5").replace(b"close", b"keep-alive"),
        [400, 400],
    ),
    "a length too long is awaited": (post(BODY, b"Content-Length: 99"), [408]),
    "a length beyond the limit is refused before it comes": (post(BODY, b"Content-Length: 999999999"), [413]),
    "a length of more digits than a number has": (post(BODY, b"Content-Length: " + b"9" * 30), [400]),
    "a negative length": (post(BODY, b"Content-Length: -1"), [400]),
    "a length with a sign": (post(BODY, b"Content-Length: +19"), [400]),
    "a length that is none": (post(BODY, b"Content-Length: many"), [400]),
    "chunks": (post(b"13\r\n" + BODY + b"\r\n0\r\n\r\n", CHUNKED), [200]),
    "chunks beyond the limit": (post(b"30d40\r\n" + b" " * 200_000 + b"\r\n1\r\n \r\n", CHUNKED), [413]),
    "a chunk size that is none": (post(b"zz\r\n" + BODY, CHUNKED), [400]),
    "a chunk size beyond all sizes": (post(b"1" * 100 + b"\r\n", CHUNKED), [400]),
    "a chunk longer than its size": (post(b"5\r\n" + BODY + b"\r\n0\r\n\r\n", CHUNKED), [400]),
    "chunks that stop": (post(b"13\r\n" + BODY + b"\r\n", CHUNKED), [408]),
    # Smuggling: two servers must not disagree on where a request ends
    "both framings": (post(SMUGGLED, CHUNKED, b"Content-Length: 4"), [400]),
    "both framings, the other way round": (post(SMUGGLED, b"Content-Length: 4", CHUNKED), [400]),
    "two lengths": (post(BODY, b"Content-Length: 19", b"Content-Length: 5"), [400]),
    "two lengths in one header": (post(BODY, b"Content-Length: 19, 5"), [400]),
    "two encodings": (post(SMUGGLED, CHUNKED, b"Transfer-Encoding: identity"), [501]),
    "an unknown encoding": (post(SMUGGLED, b"Transfer-Encoding: xchunked"), [501]),
    "a space before the colon": (post(SMUGGLED, b"Transfer-Encoding : chunked"), [400]),
    "an encoding in HTTP/1.0": (post(SMUGGLED, CHUNKED, version=b"1.0"), [400]),
    "a request in the body of another": (post(BODY + SMUGGLED), [400]),
    # Heads
    "a header over the limit": (get(b"X: " + b"x" * 60_000), [431]),
    "many small headers": (get(*(b"X-%d: x" % i for i in range(5000))), [431]),
    "a path over the limit": (get(line=b"GET /" + b"x" * 60_000 + b" HTTP/1.1"), [431]),
    "NUL in a header": (get(b"X: a\0b"), [400]),
    "NUL in a path": (get(line=b"GET /\0 HTTP/1.1"), [400]),
    "a header without a colon": (get(b"nothing"), [400]),
    "a header that is not ASCII": (get("X: ☃".encode()), [200]),
    "two hosts": (get(b"Host: y"), [400]),
    "no host": (b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n", [400]),
    "no version": (b"GET /health/live\r\n\r\n", [400]),
    "HTTP/2 by prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [404, 400]),
    "TLS": (b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03\r\n\r\n", [400]),
    "blank lines": (b"\r\n\r\n\r\n", [400]),
    "HTTP/1.0": (b"GET /health/live HTTP/1.0\r\n\r\n", [200]),
    "a body in HTTP/1.0": (post(BODY, version=b"1.0"), [200]),
    # Methods and paths
    "an unknown method": (get(line=b"BREW /summarize HTTP/1.1"), [405]),
    "a method in small letters": (get(line=b"post /summarize HTTP/1.1"), [405]),
    "a method that is no token": (get(line=b"G(T /summarize HTTP/1.1"), [400]),
    "CONNECT": (get(line=b"CONNECT x:443 HTTP/1.1"), [404]),
    "TRACE": (get(line=b"TRACE /summarize HTTP/1.1"), [405]),
    "every path": (get(line=b"OPTIONS * HTTP/1.1"), [404]),
    "a path upwards": (get(line=b"GET /../../etc/passwd HTTP/1.1"), [404]),
    "a path with an escaped NUL": (get(line=b"GET /summarize%00 HTTP/1.1"), [404]),
    "a path that is not UTF-8": (get(line=b"GET /%ff%fe HTTP/1.1"), [404]),
    "an upgrade to HTTP/2": (
        get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"),
        [200],
    ),
    "an upgrade to a web socket": (get(b"Connection: Upgrade", b"Upgrade: websocket"), [200]),
    # Bodies
    "a body that is not UTF-8": (post(b'{"inputs": "\xff\xfe\x80"}'), [400]),
    "a surrogate in UTF-8": (post(b'{"inputs": "\xed\xa0\x80"}'), [400]),
    "a surrogate escaped": (post(b'{"inputs": "\\ud800"}'), [422]),
    "NUL in a text": (post(b'{"inputs": "a\\u0000b"}'), [200]),
    "NUL in JSON": (post(b'{"inputs": "a\0b"}'), [400]),
    "UTF-16": (post('{"inputs": "hello"}'.encode("utf-16")), [400]),
    "arrays in arrays": (post(b"[" * 90_000 + b"]" * 90_000), [400]),
    "objects in objects": (post(b'{"a":' * 30_000 + b"1" + b"}" * 30_000), [400]),
    "NaN": (post(json_of(options=b'{"length_penalty": NaN}'), path=b"/summarize"), [400]),
    "infinity": (post(json_of(options=b'{"length_penalty": -Infinity}'), path=b"/summarize"), [400]),
    "a float beyond floats": (post(json_of(options=b'{"length_penalty": 1e999}'), path=b"/summarize"), [422]),
    "a float beyond integers": (post(json_of(options=b'{"num_beams": 1e308}'), path=b"/summarize"), [422]),
    "an integer beyond 64 bits": (post(json_of(options=b'{"num_beams": %d}' % 10**400), path=b"/summarize"), [422]),
    "a negative integer beyond 64 bits": (post(json_of(options=b'{"seed": -%d}' % 10**400), path=b"/summarize"), [422]),
    "an integer of 5,000 digits": (post(json_of(b"9" * 5000), path=b"/summarize"), [400]),
    "a key twice": (post(b'{"inputs": 1, "inputs": "hello"}'), [200]),
    "a compressed body": (post(b"\x1f\x8b\x08\0", b"Content-Encoding: gzip"), [415]),
    # Several requests on a connection
    "pipelined requests": (HEALTH * 3 + post(BODY).replace(b"close", b"keep-alive") + HEALTH + LAST, [200] * 6),
    "rubbish behind a request": (HEALTH + b"rubbish\r\n\r\n" + HEALTH, [200, 400]),
    "a reply that does not read the body": (
        HEALTH.replace(b"\r\n\r\n", b"\r\nContent-Length: 999\r\n\r\n") + b"x",
        [200],
    ),
}


def connect(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=10)


def read_to_end(client: socket.socket) -> bytes:
    """Everything until the server closes; it may reset a connection whose rest it has not read."""
    received = b""
    with suppress(ConnectionResetError):
        while data := client.recv(65536):
            received += data
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def exchange(server: Server, data: bytes) -> bytes:
    """Send, and read until the server closes."""
    with connect(server) as client:
        with suppress(ConnectionError):
            client.sendall(data)
        return read_to_end(client)


def abort(client: socket.socket) -> None:
    """Close with a reset, as a crashed client's kernel does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def drip(client: socket.socket, data: bytes, pause: float) -> bool:
    """Send a byte at a time; whether the server put an end to it."""
    with suppress(ConnectionError):
        for byte in data:
            client.send(bytes([byte]))
            time.sleep(pause)
        return False
    return True


def summary(server: Server) -> str:
    """A short one, from a client that behaves, on a connection of its own."""
    options = {"num_beams": 1, "min_new_tokens": 4, "max_new_tokens": 4}
    body = {"inputs": CONVERSATIONS[2], "parameters": {"generate_parameters": options}}
    reply = server.client.post("/summarize", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()[0]["summary_text"])


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One process for all of it."""
    log = tmp_path_factory.mktemp("raw") / "log"
    with start_server(
        log,
        model=checkpoint,
        dtype="float32",
        header_timeout=HEADER_TIMEOUT,
        body_timeout=BODY_TIMEOUT,
        keep_alive_timeout=1,
        max_body_bytes=MAX_BODY_BYTES,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def before(server: Server) -> tuple[str, int]:
    """A summary, and the number of open files, before anything odd was sent."""
    text = summary(server)
    return text, open_files(server)


@pytest.fixture(autouse=True)
def next_caller(server: Server, before: tuple[str, int]) -> Iterator[None]:
    """After every test a normal request gets what it got before all of them."""
    yield
    assert summary(server) == before[0]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gets_its_answer_and_an_end(name: str, server: Server) -> None:
    data, expected = SHAPES[name]
    received = exchange(server, data)
    assert statuses(received) == expected
    if expected and expected[-1] >= 400 and b"BREW" not in data:
        assert b"content-type: application/problem+json" in received.lower()


def test_a_slow_head_gets_408_however_it_drips(server: Server) -> None:
    started = time.monotonic()
    with connect(server) as client:
        assert drip(client, HEALTH[:-4] + b"x" * DRIPS, HEADER_TIMEOUT / 20)
        assert statuses(read_to_end(client)) == [408]
    assert time.monotonic() - started >= HEADER_TIMEOUT


def test_a_slow_body_gets_408_however_it_drips(server: Server) -> None:
    started = time.monotonic()
    with connect(server) as client:
        client.sendall(post(b"", b"Content-Length: 10000"))
        assert drip(client, b" " * DRIPS, BODY_TIMEOUT / 20)
        assert statuses(read_to_end(client)) == [408]
    assert time.monotonic() - started >= BODY_TIMEOUT


def test_a_silent_connection_is_closed(server: Server) -> None:
    assert exchange(server, b"") == b""


def test_a_half_closed_connection_counts_as_left(server: Server) -> None:
    # 120 tokens: not done before the other end is seen to be closed.
    long = json_of(options=b'{"num_beams": 8, "min_new_tokens": 120, "max_new_tokens": 120}')
    for data in (b"", HEALTH[:10], post(BODY)[:-5], post(long, path=b"/summarize")):
        with connect(server) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b""


def test_100_continue_is_said_before_the_body_is_read_and_not_before_a_refusal(server: Server) -> None:
    with connect(server) as client:
        client.sendall(post(b"", b"Expect: 100-continue", b"Content-Length: %d" % len(BODY)))
        assert client.recv(1000).startswith(b"HTTP/1.1 100 ")
        client.sendall(BODY)
        assert statuses(read_to_end(client)) == [200]
    received = exchange(server, post(b"", b"Expect: 100-continue", b"Content-Length: %d" % (MAX_BODY_BYTES + 1)))
    assert statuses(received) == [413]


def test_many_slow_clients_do_not_keep_others_out(server: Server, before: tuple[str, int]) -> None:
    clients = []
    for _ in range(SLOW):
        clients.append(connect(server))
        clients[-1].sendall(HEALTH[:-2])  # at once: to one that says nothing in time the server says nothing, either
    started = time.monotonic()
    assert summary(server) == before[0]
    assert time.monotonic() - started < 5
    for client in clients:
        with client:
            assert statuses(read_to_end(client)) == [408]


def test_two_thousand_clients_that_abort_leave_nothing_behind(server: Server) -> None:
    request = post(json_of(), path=b"/summarize")
    cuts = [0, 10, len(request) - 30, len(request) - 1, len(request)]
    for number in range(ABORTED):
        client = connect(server)
        # One in a hundred has asked for a summary and leaves before it comes.
        cut = cuts[number % 4] if number % 100 else cuts[4]
        client.sendall(request[:cut])
        abort(client)
    left = ("precis_admitted_tokens", "precis_running", "precis_queue_depth")
    until(lambda: [server.metric(name) for name in left] == [0, 0, 0])  # the engine drops them at its next step


def test_at_the_end_it_is_the_same_process_with_the_files_it_had_open(server: Server, before: tuple[str, int]) -> None:
    assert server.process.poll() is None
    until(lambda: open_files(server) <= before[1])
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log.replace("ERROR app.exception_handlers: not-implemented", "")
