"""Request heads on a real socket: late, too large, not HTTP, framed in two ways; and replies that nobody waits for."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.protocol import Protocol
from tests.service import serving

pytestmark = pytest.mark.anyio

TIMEOUT = 0.2
MAX_HEADER_BYTES = 2048
KERNEL_BYTES = 1 << 18
GOOD = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LONG = GOOD.replace(b"/health", b"/openapi.json")
CHUNKED = b"POST /summarize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"


class Connection:
    """One client connection.

    Attributes:
        since: `time.monotonic()` before it was opened, and so before any of the server's timers.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, since: float) -> None:
        self.reader = reader
        self.writer = writer
        self.since = since

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next reply."""
        async with asyncio.timeout(5):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("ascii")
            lines = head.split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if line)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(lines[0].split()[1]), headers, body

    async def everything(self) -> bytes:
        """What the server says until it closes, in whatever way."""
        received = b""
        with suppress(ConnectionError):
            while data := await self.reader.read(65536):
                received += data
        return received

    async def closed(self) -> float:
        """Wait until the server closes, which says nothing more; `time.monotonic()` then."""
        async with asyncio.timeout(5):
            assert await self.everything() == b""
        return time.monotonic()


@asynccontextmanager
async def listening(
    keep_alive: int = 5, header_timeout: float = 5, reply_timeout: float = 0.3
) -> AsyncIterator[tuple[int, set[Protocol]]]:
    """The application without a model behind a real socket; its port and its open connections."""
    async with serving(body_timeout=5) as service:
        config = uvicorn.Config(
            service.app,
            log_config=None,  # as the service does: uvicorn's own would change this process's loggers for good
            ws="none",
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=keep_alive,
        )
        config.load()
        state = ServerState()
        factory = partial(Protocol, config, state, {}, header_timeout=header_timeout, reply_timeout=reply_timeout)
        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
        async with server:
            # Connections inherit it: the kernel takes little of a reply that the client does not take.
            server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
            yield server.sockets[0].getsockname()[1], state.connections  # type: ignore[misc]


@asynccontextmanager
async def connected(keep_alive: int = 5, header_timeout: float = 5) -> AsyncIterator[Connection]:
    """One connection, after which none is left on the server."""
    async with listening(keep_alive, header_timeout) as (port, connections):
        since = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield Connection(reader, writer, since)
        finally:
            writer.close()
            async with asyncio.timeout(5):
                while connections:
                    await asyncio.sleep(0.01)


async def test_a_head_that_does_not_arrive_whole_gets_408_in_the_common_body() -> None:
    async with connected(header_timeout=TIMEOUT) as client:
        await client.send(GOOD[:-2])
        status, headers, body = await client.reply()
        assert status == 408
        assert headers["content-type"] == "application/problem+json"
        problem = json.loads(body)
        assert problem["error"] == "The request's head did not arrive within 0.2 s."
        assert problem["instance"] == f"urn:request:{headers['x-request-id']}"
        assert headers["connection"] == "close"
        assert await client.closed() - client.since >= TIMEOUT


async def test_a_byte_now_and_then_does_not_extend_the_deadline() -> None:
    async with connected(header_timeout=TIMEOUT) as client, asyncio.timeout(5), asyncio.TaskGroup() as group:
        reading = group.create_task(client.everything())
        while not reading.done():
            with suppress(ConnectionError):  # the server may have closed meanwhile
                await client.send(b"G")
            await asyncio.sleep(TIMEOUT / 5)
    assert reading.result().startswith(b"HTTP/1.1 408 ")


async def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async with connected(header_timeout=TIMEOUT) as client:
        assert await client.closed() - client.since >= TIMEOUT


async def test_a_second_head_has_its_own_deadline() -> None:
    async with connected(header_timeout=TIMEOUT) as client:
        await client.send(GOOD)
        assert (await client.reply())[0] == 200
        await asyncio.sleep(2 * TIMEOUT)  # idle: the keep-alive timeout counts, not the head's
        await client.send(GOOD)
        assert (await client.reply())[0] == 200
        await client.send(GOOD[:10])
        assert (await client.reply())[0] == 408


async def test_an_idle_connection_is_closed_after_the_keep_alive_timeout() -> None:
    async with connected(keep_alive=1, header_timeout=TIMEOUT) as client:
        asked = time.monotonic()
        await client.send(GOOD)
        assert (await client.reply())[0] == 200
        assert 1 <= await client.closed() - asked < 4


async def test_a_body_that_drips_after_its_reply_is_not_awaited_for_ever() -> None:
    async with connected(keep_alive=60, header_timeout=TIMEOUT) as client:
        await client.send(GOOD[:-2] + b"Content-Length: 1000\r\n\r\n")
        assert (await client.reply())[0] == 200  # a route that reads no body
        with suppress(ConnectionError):
            async with asyncio.timeout(5):
                while True:
                    await client.send(b"x")
                    await asyncio.sleep(TIMEOUT / 5)


async def test_a_client_that_does_not_take_its_replies_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as (port, connections):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(LONG * 500)  # more than the kernel's buffers hold
        while not connections:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            while connections:
                await asyncio.sleep(0.01)
        writer.close()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_takes_its_replies_slowly_gets_them_all() -> None:
    async with listening(reply_timeout=1) as (port, connections):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        client = Connection(reader, writer, time.monotonic())
        await client.send(LONG)
        _, _, document = await client.reply()
        (connection,) = connections
        count = 24 * KERNEL_BYTES // len(document)
        await client.send(LONG * count + LAST)
        began, paused, received = time.monotonic(), 0.0, bytearray()
        while data := await reader.read(KERNEL_BYTES // 8):  # in more than 190 pieces
            received += data
            await asyncio.sleep(0.01)
            if connection.flow.write_paused:
                paused = time.monotonic() - began
        assert received.count(b"HTTP/1.1 200 OK") == received.count(document) + 1 == count + 1
        assert paused > 1  # the server waited longer for all of it than it waits for any part
        writer.close()


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["unfinished", "whole"])
@pytest.mark.parametrize("line", [b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"GET /health?"], ids=["header", "target"])
async def test_a_head_over_the_limit_gets_431(line: bytes, end: bytes) -> None:
    if not line.endswith(b": "):
        end = end and b" HTTP/1.1\r\nHost: x" + end
    async with connected() as client:
        await client.send(line + b"x" * (MAX_HEADER_BYTES + 1) + end)
        status, _, body = await client.reply()
        assert status == 431
        assert json.loads(body)["detail"].startswith("The request's head is larger than 2048 bytes")
        await client.closed()


async def test_a_head_under_the_limit_is_read() -> None:
    async with connected() as client:
        await client.send(GOOD[:-2] + b"X: " + b"x" * (MAX_HEADER_BYTES - 100) + b"\r\n\r\n")
        assert (await client.reply())[0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        GOOD[:-2] + b"X: a\0b\r\n\r\n",
        GOOD[:-2] + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        GOOD[:-2] + b"Content-Length: -1\r\n\r\n",
        CHUNKED + b"Content-Length: 3\r\n\r\n0\r\n\r\n",
        CHUNKED.replace(b"1.1", b"1.0") + b"\r\n0\r\n\r\n",
        CHUNKED + b"\r\nnot a size\r\n",
    ],
    ids=["tls", "0.9", "no host", "nul", "two lengths", "negative", "two framings", "chunked 1.0", "chunk"],
)
async def test_what_is_not_http_gets_400_in_the_common_body(request_: bytes) -> None:
    async with connected() as client:
        await client.send(request_)
        status, headers, body = await client.reply()
        assert status == 400
        assert json.loads(body)["detail"] == headers["x-error-message"] == "The request is not valid HTTP/1.1."
        await client.closed()


async def test_unknown_transfer_encodings_get_501() -> None:
    async with connected() as client:
        await client.send(CHUNKED.replace(b"chunked", b"gzip, chunked") + b"\r\n")
        assert (await client.reply())[0] == 501


async def test_rubbish_after_an_answered_request_closes_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as client:
        await client.send(GOOD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n")
        assert (await client.reply())[0] == 200
        await client.send(b"no size\r\n")
        await client.closed()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_refused_head_is_counted() -> None:
    async with listening() as (port, _):
        for request_ in (b"rubbish\r\n\r\n", GOOD.replace(b"/health", b"/metrics")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            client = Connection(reader, writer, time.monotonic())
            await client.send(request_)
            status, _, body = await client.reply()
            writer.close()
        assert status == 200
        assert b'precis_errors_total{kind="bad-request"} 1.0' in body


async def test_the_servers_end_finds_a_broken_connection_that_is_not_closed_yet() -> None:
    async with listening() as (port, connections):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not connections:
            await asyncio.sleep(0.01)
        (connection,) = connections
        connection.conn.send_failed()
        connection.transport.close()
        connection.shutdown()
        assert await reader.read() == b""
        writer.close()
