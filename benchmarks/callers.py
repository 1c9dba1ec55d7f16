"""Mixed callers for a soak: each sends a request of some kind, checks the reply, and writes down what it saw.

Good requests of every shape, requests that are refused, deadlines that pass, and callers that leave: while their body
is on its way, while they wait, and in the middle of a stream. Knows the wire format. Does not know the server's
process, nor what is made of the ledger.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from benchmarks import traffic

MAX_BODY_BYTES = 200_000  # of the server that they call
MAX_BATCH_SIZE = 32
TIMEOUT = 120.0
SLOW = {"num_beams": 4, "min_new_tokens": 100, "max_new_tokens": 120}  # more than a second, whatever the text
MOST_TURNS = 20  # of a text
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 1},
    {"num_beams": 2, "length_penalty": 0.6, "early_stopping": True},
    {"num_beams": 1, "do_sample": True, "seed": 7, "top_k": 50, "temperature": 0.8},
    {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 24},
    {"num_beams": 8, "max_new_tokens": 16, "no_repeat_ngram_size": 2},
)
PATHS = ("/summarize", "/summarize", "/", "/invocations", "/score")  # one body, four doors
PROBES = ("/health", "/health/live", "/health/ready", "/ping", "/info")
JSON = {"content-type": "application/json"}

# name -> method, path, body, headers, the status that it must get
Refused = tuple[str, str, bytes, dict[str, str], int]


def _body(inputs: Any, **options: Any) -> bytes:
    return json.dumps({"inputs": inputs, "parameters": {"generate_parameters": options}}).encode()


REFUSED: dict[str, Refused] = {
    "not JSON": ("POST", "/summarize", b'{"inputs": "cut o', JSON, 400),
    "NaN": ("POST", "/summarize", b'{"inputs": "a", "parameters": {"length_penalty": NaN}}', JSON, 400),
    "another media type": ("POST", "/summarize", b"a text", {"content-type": "text/plain"}, 415),
    "an Accept of others": ("POST", "/summarize", _body("a"), {**JSON, "accept": "image/png"}, 406),
    "no text": ("POST", "/summarize", b"{}", JSON, 422),
    "a blank text": ("POST", "/summarize", _body(["a text", " "]), JSON, 422),
    "too many beams": ("POST", "/summarize", _body("a", num_beams=99), JSON, 422),
    "options at odds": ("POST", "/summarize", _body("a", num_beams=2, num_return_sequences=3), JSON, 422),
    "a text too long": ("POST", "/summarize", _body("word " * 600), JSON, 413),
    "too many texts": ("POST", "/summarize", _body(["a"] * (MAX_BATCH_SIZE + 1)), JSON, 413),
    "a body too large": ("POST", "/summarize", b" " * (MAX_BODY_BYTES + 1), JSON, 413),
    "a deadline that is none": ("POST", "/summarize", _body("a"), {**JSON, "x-request-timeout": "soon"}, 422),
    "nothing there": ("GET", "/nowhere", b"", {}, 404),
    "another method": ("DELETE", "/summarize", b"", {}, 405),
}


@dataclass
class Ledger:
    """What was sent and what came.

    Attributes:
        kinds: requests of each kind.
        replies: of each status, to callers that stayed.
        texts: in replies of 200 to callers that stayed; `left_texts` of those that left.
        left: requests whose callers left before the end of the reply.
        compared: summaries that were held against their reference.
        deadlines: requests of which the server said that their deadline had passed.
        faults: what should not have been, in words without any text.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    replies: Counter[int] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    texts: int = 0
    left_texts: int = 0
    left: int = 0
    compared: int = 0
    deadlines: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Requests, whoever stayed for the reply."""
        return self.replies.total() + self.left


class Callers:
    """So many at a time, each with one request at a time, kinds and texts by chance from a seed."""

    def __init__(self, url: str, references: int, options: int = len(OPTIONS), seed: int = 0) -> None:
        """Prepare.

        Args:
            references: texts whose summaries are known, with each of the first `options` of OPTIONS.
        """
        self.ledger = Ledger()
        self._url = httpx.URL(url)
        self._known = traffic.conversations(references, seed)
        self._options = OPTIONS[:options]
        self._reference: dict[tuple[str, int], str] = {}
        self._number = count()
        self._seed = seed
        self._kinds: dict[str, tuple[int, Callable[[random.Random], Awaitable[None]]]] = {
            "one text": (30, self._one),
            "several texts": (8, self._several),
            "a stream": (12, self._stream),
            "left while waiting": (10, self._leave_waiting),
            "left a stream": (6, self._leave_stream),
            "left while sending": (6, self._leave_sending),
            "refused": (14, self._refused),
            "a deadline that passes": (4, self._late),
            "tokenize": (5, self._tokenize),
            "a probe": (5, self._probe),
        }

    async def learn(self) -> None:
        """Ask for every reference, one after the other."""
        async with self._connections() as self._client:
            for text in self._known:
                for index in range(len(self._options)):
                    items = await self._summaries([text], index, "/summarize")
                    self._reference[text, index] = items[0]["summary_text"] if items else ""
        self.ledger.compared = 0

    async def call(self, concurrency: int, seconds: float) -> None:
        """Keep so many requests in flight, for so long; connections are closed at the end."""
        stop = asyncio.Event()
        async with self._connections() as self._client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                self._seed += 1
                group.create_task(self._worker(random.Random(self._seed), stop))
            await asyncio.sleep(seconds)
            stop.set()

    async def fill_threads(self, requests: int) -> None:
        """As much tokenising at once as makes the server start all of its worker threads."""
        texts = ["\n".join(self._known) * 4] * MAX_BATCH_SIZE
        body = json.dumps({"inputs": texts}).encode()[:MAX_BODY_BYTES]
        while len(body) >= MAX_BODY_BYTES:
            texts = texts[1:]
            body = json.dumps({"inputs": texts}).encode()
        async with self._connections() as self._client:
            await asyncio.gather(*(self._expect("POST", "/tokenize", body, JSON, 200) for _ in range(requests)))

    async def fill_caches(self, slots: int) -> None:
        """A text for every slot, with each set of options, of as many tokens as the server takes and gives.

        Each kind of search has caches of its own, which take memory where they are written: as long as no text had been
        of the greatest length, each that was longer than those before it in its slot took some more. Then as many texts
        again of all lengths that end one after the other: oneDNN keeps code for every number of rows that it has met.
        """
        generator = random.Random(self._seed)
        async with self._connections() as self._client:
            text, longest = await self._greatest()
            for options in self._options:
                await self._all_of([text] * slots, **{**options, **longest})
                await asyncio.gather(
                    *(
                        self._all_of(
                            [traffic.conversation(generator, 2 + slot % (MOST_TURNS - 1))],
                            **{**options, "min_new_tokens": 2 + 2 * slot, "max_new_tokens": 2 + 2 * slot},
                        )
                        for slot in range(slots)
                    )
                )

    async def _greatest(self) -> tuple[str, dict[str, int]]:
        """A text that has as many tokens as the server takes, and options for a summary of as many as it gives."""
        reply = await self._expect("GET", "/info", b"", {}, 200)
        if reply is None:
            raise RuntimeError("the server does not say what it takes")
        limits = reply.json()["limits"]
        text = " ".join(["word"] * (limits["max_input_tokens"] - 2))  # one token each, with one before and one behind
        await self._expect("POST", "/summarize", _body([f"{text} word"]), JSON, 413)
        return text, dict.fromkeys(("min_new_tokens", "max_new_tokens"), limits["max_output_tokens"])

    async def _all_of(self, texts: list[str], **options: Any) -> None:
        """One request, which must be answered."""
        reply = await self._expect("POST", "/summarize", _body(texts, **options), JSON, 200)
        self.ledger.texts += len(texts) if reply is not None else 0

    async def fill_slots(self, slots: int) -> int:
        """One request with a text for every slot; the most that were seen running at once."""
        texts = [self._known[index % len(self._known)] for index in range(slots)]
        async with self._connections() as self._client:
            body = _body(texts, num_beams=1, min_new_tokens=80, max_new_tokens=80)
            reply = asyncio.create_task(self._expect("POST", "/summarize", body, JSON, 200))
            most = 0
            while not reply.done():
                most = max(most, int((await traffic.scrape(str(self._url)))["precis_running"]))
                await asyncio.sleep(0.05)
            self.ledger.texts += len(texts) if reply.result() is not None else 0
        return most

    def _connections(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
        return httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT, limits=limits)

    async def _worker(self, generator: random.Random, stop: asyncio.Event) -> None:
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        while not stop.is_set():
            (name,) = generator.choices(names, weights)
            self.ledger.kinds[name] += 1
            try:
                await self._kinds[name][1](generator)
            except (httpx.TransportError, OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
                self._fault(f"{name}: {type(error).__name__}")

    async def _one(self, generator: random.Random) -> None:
        await self._summaries([self._text(generator)], self._option(generator), generator.choice(PATHS))

    async def _several(self, generator: random.Random) -> None:
        texts = [self._text(generator) for _ in range(generator.randint(2, 8))]
        await self._summaries(texts, self._option(generator), generator.choice(PATHS), {"x-priority": "batch"})

    async def _stream(self, generator: random.Random) -> None:
        texts = [self._text(generator) for _ in range(generator.choice((1, 1, 3)))]
        option = self._option(generator)
        content = json.dumps({**json.loads(_body(texts, **self._options[option])), "stream": True}).encode()
        request_id = self._request_id()
        headers = {**JSON, "x-request-id": request_id}
        parts, items, ends = [""] * len(texts), dict[int, Any](), list[str]()
        async with self._client.stream("POST", "/summarize", content=content, headers=headers) as reply:
            self._answered(reply, request_id, 200)
            name = ""
            async for line in reply.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    if name == "delta":
                        parts[data["index"]] += data["text"]
                    elif name == "result":
                        self._check(data["index"] not in items, "a stream gave an item twice")
                        items[data["index"]] = data
                    else:
                        ends.append(name)
        self._check(ends == ["done"], f"a stream ended with {ends}")
        self._check(sorted(items) == list(range(len(texts))), "a stream did not give every item once")
        for index, item in items.items():
            self._check(parts[index] == item["summary_text"], "streamed parts are not the summary")
            self._compare(texts[index], option, item)
        self.ledger.texts += len(texts)

    async def _leave_waiting(self, generator: random.Random) -> None:
        texts = [self._text(generator) for _ in range(generator.choice((1, 1, 4)))]
        _, writer = await self._connect()
        await self._send(writer, _body(texts, **SLOW))
        await asyncio.sleep(generator.uniform(0, 0.8))
        await self._leave(writer, len(texts))

    async def _leave_stream(self, generator: random.Random) -> None:
        body = {**json.loads(_body(self._text(generator), **{**SLOW, "num_beams": 1})), "stream": True}
        reader, writer = await self._connect()
        await self._send(writer, json.dumps(body).encode())
        try:
            await asyncio.wait_for(reader.readuntil(b"event: delta"), TIMEOUT)
            await asyncio.sleep(generator.uniform(0, 0.2))
        finally:
            await self._leave(writer, 1)

    async def _leave_sending(self, generator: random.Random) -> None:
        body = _body(self._text(generator))
        _, writer = await self._connect()
        await self._send(writer, body, generator.randrange(len(body)))
        await asyncio.sleep(generator.uniform(0, 0.1))
        await self._leave(writer, 0)

    async def _refused(self, generator: random.Random) -> None:
        name = generator.choice(list(REFUSED))
        await self._expect(*REFUSED[name])

    async def _late(self, generator: random.Random) -> None:
        headers = {**JSON, "x-request-timeout": f"{generator.uniform(0.01, 0.3):.3f}"}
        body = _body([self._text(generator) for _ in range(4)], **SLOW)
        await self._expect("POST", "/summarize", body, headers, 504)
        self.ledger.deadlines += 1

    async def _tokenize(self, generator: random.Random) -> None:
        texts = [self._text(generator) * generator.randint(1, 4) for _ in range(generator.randint(1, 8))]
        reply = await self._expect("POST", "/tokenize", json.dumps({"inputs": texts}).encode(), JSON, 200)
        self._check(reply is None or len(reply.json()) == len(texts), "a count for each text is missing")

    async def _probe(self, generator: random.Random) -> None:
        await self._expect("GET", generator.choice(PROBES), b"", {}, 200)

    async def _summaries(
        self, texts: Sequence[str], option: int, path: str, headers: dict[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """One request, checked; no items where it failed."""
        inputs = texts[0] if len(texts) == 1 else texts
        body = _body(inputs, **self._options[option])
        reply = await self._expect("POST", path, body, {**JSON, **(headers or {})}, 200)
        if reply is None:
            return []
        items: list[dict[str, Any]] = reply.json()
        self._check(len(items) == len(texts), "the reply has not an item for each text")
        for text, item in zip(texts, items, strict=False):
            self._compare(text, option, item)
        self.ledger.texts += len(texts)
        return items

    async def _expect(
        self, method: str, path: str, body: bytes, headers: dict[str, str], status: int
    ) -> httpx.Response | None:
        """Send a request with an id of its own; the reply, if it is of this status."""
        request_id = self._request_id()
        reply = await self._client.request(
            method, path, content=body or None, headers={**headers, "x-request-id": request_id}
        )
        return reply if self._answered(reply, request_id, status) else None

    def _answered(self, reply: httpx.Response, request_id: str, status: int) -> bool:
        self.ledger.replies[reply.status_code] += 1
        answered = reply.headers.get("x-request-id", "")
        self._check(answered == request_id, "a reply has another request's id")
        self._check(answered not in self.ledger.ids, "a request was answered twice")
        self.ledger.ids.add(answered)
        self._check(reply.status_code == status, f"{reply.status_code} where {status} was due")
        return reply.status_code == status

    def _compare(self, text: str, option: int, item: dict[str, Any]) -> None:
        if reference := self._reference.get((text, option)):
            self.ledger.compared += 1
            self._check(item["summary_text"] == reference, f"a summary is not its reference (options {option})")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._url.host, self._url.port)

    async def _send(self, writer: asyncio.StreamWriter, body: bytes, cut: int | None = None) -> None:
        """A whole head, and the body up to `cut`: from here on the server counts a request."""
        head = (
            f"POST /summarize HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body[:cut])
        await writer.drain()

    async def _leave(self, writer: asyncio.StreamWriter, texts: int) -> None:
        self.ledger.left += 1
        self.ledger.left_texts += texts
        writer.close()
        await writer.wait_closed()

    def _request_id(self) -> str:
        return f"soak-{next(self._number)}"

    def _text(self, generator: random.Random) -> str:
        """One whose summaries are known, or a new one."""
        if generator.random() < 0.5:
            return generator.choice(self._known)
        return traffic.conversation(generator, generator.randint(1, MOST_TURNS))

    def _option(self, generator: random.Random) -> int:
        return generator.randrange(len(self._options))

    def _check(self, good: bool, words: str) -> None:
        if not good:
            self._fault(words)

    def _fault(self, words: str) -> None:
        self.ledger.faults.append(words)
