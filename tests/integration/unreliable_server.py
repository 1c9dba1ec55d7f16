"""A server on a real socket that drops, delays and refuses by the dice, and keeps the books.

Knows the bytes of HTTP/1.1, for only so can a reply break off in the middle. Does not know summaries: the answer to a
text is the text backwards.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# What happens to a request, and how often in a hundred; the rest is answered.
FAULTS = {
    "drop after reading": 5.0,
    "drop in the head": 2.0,
    "drop in the body": 4.0,
    "drop in a chunk": 3.0,
    "hang": 0.3,
    "slow": 5.0,
    "answer and close": 4.0,
    "429 at once": 5.0,
    "429 in a second": 1.0,
    "503": 5.0,
    "504": 4.0,
    "502 of a proxy": 2.0,
    "500": 3.0,
}
REFUSED = {
    "429 at once": (429, "queue-full", "0"),
    "429 in a second": (429, "queue-full", "1"),
    "503": (503, "not-ready", "0"),
    "504": (504, "deadline-exceeded", None),
    "500": (500, "internal-error", None),
}
DROPPED_BEFORE_READING = 0.05
LIMITS = {"max_input_tokens": 512, "max_batch_size": 8, "max_body_bytes": 1 << 20, "max_queue_tokens": 65536}
INFO = {"model_id": "m", "device": "cpu", "dtype": "float32", "limits": LIMITS, "defaults": {}}


class UnreliableServer:
    """The books.

    Attributes:
        answered: how often each text was in a reply that was sent whole.
        repeated: texts that were asked for after that.
        early: batches that came back before their Retry-After.
        faults: how often each happened.
        too_long, failing: texts that are refused by name, and texts that fail their batch without being named.
    """

    def __init__(self, seed: int, too_long: Sequence[str] = (), failing: Sequence[str] = ()) -> None:
        self.answered: Counter[str] = Counter()
        self.repeated: list[str] = []
        self.early: list[str] = []
        self.faults: Counter[str] = Counter()
        self.too_long, self.failing = frozenset(too_long), frozenset(failing)
        self.port = 0
        self._seed = seed
        self._tries: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side drops it."""
        self._connections += 1
        dice = random.Random(f"{self._seed} connection {self._connections}")
        try:
            if dice.random() < DROPPED_BEFORE_READING:
                self.faults["drop before reading"] += 1
                writer.transport.abort()
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                content = await reader.readexactly(int(length or 0))
                await self._reply(content, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test did
        finally:
            writer.close()

    async def _reply(self, content: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        texts: list[str] = json.loads(content)["inputs"] if content else []
        self.repeated += [text for text in texts if self.answered[text]]
        fault = self._fault(texts[0] if texts else "/info")
        self.faults[fault] += 1
        bad = [i for i, text in enumerate(texts) if text in self.too_long]
        if fault in REFUSED:
            status, slug, retry_after = REFUSED[fault]
            writer.write(_message(status, {"type": f"/problems/{slug}", "detail": slug}, retry_after))
        elif fault == "502 of a proxy":
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\nContent-Type: text/html\r\n\r\n<html>")
        elif fault == "hang":
            await reader.read(1)  # until the client leaves
            writer.transport.abort()
        elif bad:
            errors = [{"index": i, "message": f"inputs[{i}] is too long."} for i in bad]
            writer.write(_message(413, {"type": "/problems/input-too-long", "detail": "long", "errors": errors}))
        elif self.failing & set(texts):
            writer.write(_message(500, {"type": "/problems/generation-failed", "detail": "failed"}))
        else:
            message = _message(200, [summary(text) for text in texts] if texts else INFO)
            if fault.startswith("drop"):
                await self._break_off(fault, message, writer)
                return
            if fault == "slow":
                await asyncio.sleep(0.05)
            self.answered.update(texts)
            writer.write(message)
            if fault == "answer and close":
                writer.close()

    def _fault(self, first: str) -> str:
        """By the batch and the number of the try, so that a run is the same however its requests are interleaved."""
        if time.monotonic() < self._not_before.get(first, 0):
            self.early.append(first)
        self._tries[first] += 1
        dice = random.Random(f"{self._seed} {first} {self._tries[first]}").random() * 100
        for fault, percent in FAULTS.items():
            dice -= percent
            if dice < 0:
                if fault == "429 in a second":
                    self._not_before[first] = time.monotonic() + 1
                return fault
        return "none"

    async def _break_off(self, fault: str, message: bytes, writer: asyncio.StreamWriter) -> None:
        head, _, body = message.partition(b"\r\n\r\n")
        if fault == "drop in the head":
            writer.write(head[: len(head) // 2])
        elif fault == "drop in the body":
            writer.write(message[:-1])
        elif fault == "drop in a chunk":
            size = f"{len(body):x}".encode()
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + body)
        await writer.drain()
        writer.close()


def summary(text: str) -> dict[str, Any]:
    """What the wire has for a text."""
    counts = {"output_tokens": 1, "input_tokens": 1, "source_tokens": 1}
    return {"summary_text": text[::-1], "score": -1.0, "finish_reason": "eos", "truncated": False, **counts}


def _message(status: int, body: object, retry_after: str | None = None) -> bytes:
    content = json.dumps(body).encode()
    wait = f"Retry-After: {retry_after}\r\n" if retry_after is not None else ""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{wait}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


@contextmanager
def listening(server: UnreliableServer) -> Iterator[str]:
    """Serve from a thread; the URL."""
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
            server.port = listener.sockets[0].getsockname()[1]
            started.set()
            await stop.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(10)
        yield f"http://127.0.0.1:{server.port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
