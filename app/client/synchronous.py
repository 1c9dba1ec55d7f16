"""The client for code that does not await: the asynchronous one, run by an event loop in a thread of its own.

So there is one implementation of batches, deadlines and retries; a whole call can be timed out and cancelled, which
threads that block in sockets cannot; and it works where a loop is running already, as in a notebook.

Knows threads. Does not know anything of the server.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import httpx

from app.client.asynchronous import ATTEMPT_SECONDS, DEFAULT_URL, AsyncSummarizer
from app.client.errors import ClientError
from app.client.models import Delta, Health, Info, StreamedSummary, Summary, TokenCount
from app.client.options import Options, Priority
from app.client.progress import Progress, reporting
from app.client.retry import RetryPolicy

T = TypeVar("T")


class Summarizer:
    """A Precis server. Safe to use from several threads; `with` closes its connections and ends its thread.

    Args, and what is raised, are `AsyncSummarizer`'s.
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
        self._client = AsyncSummarizer(
            base_url,
            api_key=api_key,
            timeout=timeout,
            attempt_timeout=attempt_timeout,
            max_concurrency=max_concurrency,
            retry=retry,
            transport=transport,
        )
        self._process = os.getpid()
        self._closed = False
        self._iterated: set[AsyncGenerator[Any, None]] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="precis-client", daemon=True)
        self._thread.start()
        # An iterator left open would wait at the interpreter's end for a thread that no longer runs.
        atexit.register(self.close)

    def __repr__(self) -> str:
        return repr(self._client).removeprefix("Async")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection and end the thread; what other threads are asking is cancelled."""
        if self._closed or os.getpid() != self._process:
            return
        for items in tuple(self._iterated):
            with suppress(RuntimeError):  # another thread is in it
                self._run(items.aclose)
        self._run(self._client.aclose)
        self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        atexit.unregister(self.close)

    def summarize(
        self,
        text: str,
        *,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> Summary:
        """The summary of one text. As `AsyncSummarizer.summarize`."""
        return self._run(lambda: self._client.summarize(text, timeout=timeout, priority=priority, **options))

    @overload
    def summarize_many(
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
    def summarize_many(
        self,
        texts: Iterable[str],
        *,
        return_errors: Literal[True],
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> list[Summary | ClientError]: ...
    def summarize_many(
        self,
        texts: Iterable[str],
        *,
        return_errors: bool = False,
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> list[Any]:
        """A summary for each text, in order. As `AsyncSummarizer.summarize_many`; `progress` is called in a thread."""
        texts = texts if isinstance(texts, str) else list(texts)  # a generator runs in the caller's thread
        with reporting(progress, len(texts)) as advance:
            if return_errors:
                return self._run(
                    lambda: self._client.summarize_many(
                        texts, return_errors=True, progress=advance, timeout=timeout, priority=priority, **options
                    )
                )
            return self._run(
                lambda: self._client.summarize_many(
                    texts, progress=advance, timeout=timeout, priority=priority, **options
                )
            )

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
    ) -> Iterator[Summary]: ...
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
    ) -> Iterator[Summary | ClientError]: ...
    def summarize_each(
        self,
        texts: Iterable[str],
        *,
        return_errors: bool = False,
        progress: Progress = False,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Any]:
        """As `summarize_many`, but each summary as soon as those before it are there; leaving early drops the rest."""
        texts = texts if isinstance(texts, str) else list(texts)
        with reporting(progress, len(texts)) as advance:
            if return_errors:
                found = self._client.summarize_each(
                    texts, return_errors=True, progress=advance, timeout=timeout, priority=priority, **options
                )
                yield from self._each(found)
            else:
                yield from self._each(
                    self._client.summarize_each(texts, progress=advance, timeout=timeout, priority=priority, **options)
                )

    def stream(
        self,
        text: str,
        *,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Delta | StreamedSummary]:
        """One text's summary as it is written: pieces, and last the summary. As `AsyncSummarizer.stream`."""
        return self._each(self._client.stream(text, timeout=timeout, priority=priority, **options))

    def stream_many(
        self,
        texts: Iterable[str],
        *,
        timeout: float | None = None,
        priority: Priority | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Delta | StreamedSummary]:
        """Several texts' pieces and summaries, each with its text's `index`. As `AsyncSummarizer.stream_many`."""
        texts = texts if isinstance(texts, str) else list(texts)
        return self._each(self._client.stream_many(texts, timeout=timeout, priority=priority, **options))

    def tokenize(self, text: str, *, timeout: float | None = None) -> TokenCount:
        """How many tokens a text has, and where it would have to be cut."""
        return self._run(lambda: self._client.tokenize(text, timeout=timeout))

    def tokenize_many(self, texts: Iterable[str], *, timeout: float | None = None) -> list[TokenCount]:
        """As `tokenize`, for each text, in order."""
        return self._run(lambda: self._client.tokenize_many(texts, timeout=timeout))

    def info(self, *, timeout: float | None = None) -> Info:
        """What is served: model, limits, defaults."""
        return self._run(lambda: self._client.info(timeout=timeout))

    def health(self, *, timeout: float | None = None) -> Health:
        """Whether requests are welcome now; asked once."""
        return self._run(lambda: self._client.health(timeout=timeout))

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self._stop.wait()

    def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` comes to. If the wait is broken off (Ctrl-C), so is the call, and nothing of it runs on."""
        if self._closed:
            raise RuntimeError("this Summarizer is closed")
        if os.getpid() != self._process:  # a fork has the object and not the thread: it would wait for ever
            raise RuntimeError("this Summarizer was made before a fork; make one in each process")
        ended = threading.Event()

        async def run() -> T:
            try:
                return await call()
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            ended.wait()
            raise

    def _each(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        async def following() -> T | None:
            return await anext(items, None)

        self._iterated.add(items)
        try:
            while (item := self._run(following)) is not None:
                yield item
        finally:
            self._iterated.discard(items)
            if not self._closed:
                self._run(items.aclose)
