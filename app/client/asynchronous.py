"""The client for asyncio: texts in, summaries out, whatever happens on the way.

Knows the server's routes and puts the parts together. Does not know HTTP's details, retries or streams' format.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, Unpack, cast, overload

import httpx
from pydantic import TypeAdapter, ValidationError

from app.client.batches import Batch, Text, body, encode, split
from app.client.connection import Connection, deadline_after, no_later_than
from app.client.errors import BadReply, ClientError, from_reply
from app.client.models import Delta, Health, Info, Limits, StreamedSummary, Summary, TokenCount
from app.client.options import Options, Priority, parameters
from app.client.progress import Advance, Progress, reporting
from app.client.retry import RetryPolicy
from app.client.settlement import settle
from app.client.streaming import parts

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
ATTEMPT_SECONDS = 300.0


@dataclass(frozen=True)
class _Route(Generic[T]):
    """A path that answers a list of texts with a list of the same length."""

    path: str
    answers: TypeAdapter[list[T]]


_SUMMARIZE = _Route("/summarize", TypeAdapter(list[Summary]))
_TOKENIZE = _Route("/tokenize", TypeAdapter(list[TokenCount]))


@dataclass(frozen=True)
class _Call(Generic[T]):
    """What is the same for every batch of one call; `deadline` is in the loop's time."""

    route: _Route[T]
    parameters: dict[str, Any]
    deadline: float
    headers: Mapping[str, str]
    return_errors: bool
    advance: Advance


class AsyncSummarizer:
    """A Precis server, for code that awaits. One event loop for one client; `async with` closes its connections.

    Args:
        base_url: of the server, with any prefix that a proxy adds.
        api_key: sent as `Authorization: Bearer`; by default the environment's `PRECIS_API_KEY`, if it is set.
        timeout: seconds for a whole call, waits and retries included; None is no bound. A call's own `timeout` comes
            before it.
        attempt_timeout: seconds for one request. The server is told, and drops what nobody waits for. Too short a time
            makes a busy server busier.
        max_concurrency: requests under way at once, over all calls.
        retry: what is tried again, how often, after how long.
        transport: another way to the server, such as httpx's with a proxy, certificates or a Unix socket.

    Raises:
        ValueError: the URL, the key or a number cannot be used.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        attempt_timeout: float = ATTEMPT_SECONDS,
        max_concurrency: int = 4,
        retry: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = Connection(
            base_url,
            api_key=api_key if api_key is not None else os.environ.get("PRECIS_API_KEY", "").strip(),
            attempt_timeout=attempt_timeout,
            max_concurrency=max_concurrency,
            retry=retry or RetryPolicy(),
            transport=transport,
        )
        self._timeout = timeout
        self._limits: Limits | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._connection.aclose()

    async def summarize(
        self,
        text: str,
        *,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> Summary:
        """The summary of one text.

        Args:
            priority: "batch" lets whatever is interactive go first; None leaves it to the server, which means the
                latter.

        Raises:
            ClientError: there is none; app/client/errors.py has the tree.
        """
        call = _Call(_SUMMARIZE, parameters(options), self._deadline(timeout), _headers(priority), False, _nothing)
        return await self._one(call, text)

    @overload
    async def summarize_many(
        self,
        texts: Iterable[str],
        *,
        return_errors: Literal[False] = False,
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> list[Summary]: ...
    @overload
    async def summarize_many(
        self,
        texts: Iterable[str],
        *,
        return_errors: Literal[True],
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> list[Summary | ClientError]: ...
    async def summarize_many(
        self,
        texts: Iterable[str],
        *,
        return_errors: bool = False,
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> list[Any]:
        """A summary for each text, in order.

        Args:
            return_errors: put the error of a text in its place and go on, instead of raising the first.
            progress: show a bar (with tqdm), or call this with the number of texts just answered.
            timeout: seconds for all of them.
            priority: as in `summarize`; work that nobody sits waiting for is "batch".

        Raises:
            ClientError: names the caller's own texts in `indices`. With `return_errors` only an error that every text
                would meet, such as a wrong key or option.
        """
        listed = encode(texts)
        with reporting(progress, len(listed)) as advance:
            deadline = self._deadline(timeout)
            call = _Call(_SUMMARIZE, parameters(options), deadline, _headers(priority), return_errors, advance)
            return await self._all(call, listed)

    @overload
    def summarize_each(
        self,
        texts: Iterable[str],
        *,
        return_errors: Literal[False] = False,
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Summary, None]: ...
    @overload
    def summarize_each(
        self,
        texts: Iterable[str],
        *,
        return_errors: Literal[True],
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Summary | ClientError, None]: ...
    async def summarize_each(
        self,
        texts: Iterable[str],
        *,
        return_errors: bool = False,
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Summary | ClientError, None]:
        """As `summarize_many`, but each summary as soon as those before it are there.

        An error comes in its turn, when what is before it was given. Leaving the loop early drops the rest; wrap the
        iterator in `contextlib.aclosing` to have that done at once.
        """
        listed = encode(texts)
        with reporting(progress, len(listed)) as advance:
            deadline = self._deadline(timeout)
            call = _Call(_SUMMARIZE, parameters(options), deadline, _headers(priority), return_errors, advance)
            async with self._batches(call, listed) as tasks:
                for task in tasks:
                    answers = await task
                    for index in sorted(answers):
                        yield answers[index]

    async def stream(
        self,
        text: str,
        *,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Delta | StreamedSummary, None]:
        """One text's summary as it is written: pieces, and last the summary. A server without streaming: only that.

        Until the first piece it is tried again as any other call; after it never, for pieces would come twice.

        Raises:
            ClientError: there is no summary; the pieces so far are no summary either.
        """
        content = body(encode([text]), parameters(options))
        async with aclosing(self._streamed(content, [0], self._deadline(timeout), _headers(priority))) as found:
            async for part in found:
                yield part

    async def stream_many(
        self,
        texts: Iterable[str],
        *,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Delta | StreamedSummary, None]:
        """As `stream`, for several texts at once: `index` says which text a piece or a summary is of.

        The texts of one request are written side by side; what does not fit into it is asked for after it. A request
        that is refused, or that breaks off after its first piece, ends the whole.

        Raises:
            ClientError: names the caller's own texts in `indices`; a text whose summary has come is well.
        """
        listed, deadline, asked = encode(texts), self._deadline(timeout), parameters(options)
        for batch in await self._split(listed, asked, deadline):
            callers = [text.index for text in batch]
            async with aclosing(self._streamed(body(batch, asked), callers, deadline, _headers(priority))) as found:
                async for part in found:
                    yield part

    async def tokenize(self, text: str, *, timeout: float | None = None) -> TokenCount:
        """How many tokens a text has, and where it would have to be cut.

        Raises:
            ClientError: the server does not say.
        """
        return await self._one(_Call(_TOKENIZE, {}, self._deadline(timeout), {}, False, _nothing), text)

    async def tokenize_many(self, texts: Iterable[str], *, timeout: float | None = None) -> list[TokenCount]:
        """As `tokenize`, for each text, in order."""
        call = _Call(_TOKENIZE, {}, self._deadline(timeout), {}, False, _nothing)
        return cast(list[TokenCount], await self._all(call, encode(texts)))

    async def info(self, *, timeout: float | None = None) -> Info:
        """What is served: model, limits, defaults.

        Raises:
            ClientError: the server does not say.
        """
        return await self._info(self._deadline(timeout))

    async def health(self, *, timeout: float | None = None) -> Health:
        """Whether requests are welcome now; asked once, and "not now" is an answer.

        Raises:
            ClientError: no answer, or not one of a Precis server.
        """
        deadline = self._deadline(timeout)
        async with no_later_than(deadline):
            response = await self._connection.attempt("GET", "/health", None, deadline)
        try:
            return Health.model_validate_json(response.content)
        except ValidationError:
            raise from_reply(response.status_code, response.headers, response.content) from None

    def _deadline(self, timeout: float | None) -> float:
        return deadline_after(self._timeout if timeout is None else timeout)

    async def _one(self, call: _Call[T], text: str) -> T:
        answers = await self._settle(call, encode([text]))
        return cast(T, answers[0])

    async def _all(self, call: _Call[T], texts: Sequence[Text]) -> list[T | ClientError]:
        async with self._batches(call, texts) as tasks:
            settled = await asyncio.gather(*tasks)
        return [answers[index] for answers in settled for index in sorted(answers)]

    @asynccontextmanager
    async def _batches(
        self, call: _Call[T], texts: Sequence[Text]
    ) -> AsyncIterator[list[asyncio.Task[dict[int, T | ClientError]]]]:
        """A task for each batch, in order; those not done when the block ends are cancelled."""
        batches = await self._split(texts, call.parameters, call.deadline)
        tasks = [asyncio.create_task(self._settle(call, batch)) for batch in batches]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _split(self, texts: Sequence[Text], options: Mapping[str, Any], deadline: float) -> list[Batch]:
        if not texts:
            return []
        return list(split(texts, await self._known_limits(deadline), len(body([], options))))

    async def _settle(self, call: _Call[T], batch: Batch) -> dict[int, T | ClientError]:
        async def ask(part: Batch) -> list[T]:
            content = body(part, call.parameters)
            response = await self._connection.ask("POST", call.route.path, content, call.deadline, call.headers)
            return _answers(response, call.route.answers, len(part))

        answers = await settle(batch, ask, call.return_errors)
        call.advance(len(answers))
        return answers

    async def _streamed(
        self, content: bytes, callers: Sequence[int], deadline: float, headers: Mapping[str, str]
    ) -> AsyncGenerator[Delta | StreamedSummary, None]:
        """The parts of one request; `callers[i]` is the caller's number of its text i."""
        try:
            response = await self._connection.open("/summarize", content, deadline, headers)
            async with aclosing(parts(response, len(callers), deadline, self._connection.attempt_timeout)) as found:
                async for part in found:
                    yield part.model_copy(update={"index": callers[part.index]})
        except ClientError as error:
            error.renumber(callers)
            raise

    async def _info(self, deadline: float) -> Info:
        response = await self._connection.ask("GET", "/info", None, deadline)
        info = _read(response, TypeAdapter(Info))
        self._limits = info.limits
        return info

    async def _known_limits(self, deadline: float) -> Limits:
        """Asked once: should they shrink later, a batch that is refused as too large is halved."""
        return self._limits or (await self._info(deadline)).limits


def _headers(priority: Priority | None) -> dict[str, str]:
    return {} if priority is None else {"x-priority": priority}


def _nothing(count: int) -> None:
    """Progress that nobody asked for."""


def _read(response: httpx.Response, shape: TypeAdapter[T]) -> T:
    try:
        return shape.validate_json(response.content)
    except ValidationError:  # not chained: it quotes the reply
        message = "The reply is not what a Precis server answers; is base_url right?"
        raise BadReply(message, status=response.status_code) from None


def _answers(response: httpx.Response, shape: TypeAdapter[list[T]], expected: int) -> list[T]:
    answers = _read(response, shape)
    if len(answers) != expected:
        raise BadReply(f"{expected} texts got {len(answers)} answers.", status=response.status_code)
    return answers
