"""One server over HTTP: requests with a key, bounds on number and time, retries, and errors with names.

Knows httpx. Does not know what is asked, nor what the answers mean.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx

from app.client.errors import ClientError, DeadlineExceeded, NoReply, from_reply
from app.client.retry import RetryPolicy

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
NO_HEADERS: Mapping[str, str] = {}
# Below the five seconds after which uvicorn closes an idle connection: a request must not meet it closing.
KEEPALIVE_SECONDS = 4.0


def deadline_after(timeout: float | None) -> float:
    """The loop's time `timeout` seconds from now; infinity for None."""
    return math.inf if timeout is None else asyncio.get_running_loop().time() + timeout


@asynccontextmanager
async def no_later_than(deadline: float) -> AsyncIterator[None]:
    """Bound a block by the whole call's deadline, in the loop's time.

    Raises:
        DeadlineExceeded: it has passed.
    """
    try:
        async with asyncio.timeout_at(deadline if math.isfinite(deadline) else None):
            yield
    except TimeoutError:
        raise DeadlineExceeded("The call's timeout ended before the answer came.") from None


@asynccontextmanager
async def expect_reply(seconds: float) -> AsyncIterator[None]:
    """Bound a wait for the server.

    Raises:
        NoReply: nothing came in time, or the connection failed.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise NoReply(f"No reply came within {seconds:g} s.") from None
    except httpx.RequestError as error:
        raise NoReply(f"No whole reply came: {type(error).__name__}: {error}") from error


class Connection:
    """A pool of connections to one server.

    Args:
        api_key: printable ASCII without blanks.
        attempt_timeout: seconds for the reply to one try.
        max_concurrency: requests at once; those that wait to be tried again count, so that a full server gets less.

    Raises:
        ValueError: the URL, the key or a number cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        attempt_timeout: float,
        max_concurrency: int,
        retry: RetryPolicy,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("base_url must begin with http:// or https:// and name a host")
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}; it must be at least 1")
        if not 0 < attempt_timeout < math.inf:
            raise ValueError(f"attempt_timeout is {attempt_timeout}; it must be a number of seconds above 0")
        headers = {"accept": "application/json", "content-type": "application/json"}
        if api_key:
            # Checked here, for the errors of HTTP libraries quote the header.
            if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
                raise ValueError("api_key must be printable ASCII without blanks")
            if url.userinfo:
                raise ValueError("base_url has a user and there is an api_key: a request has room for one of them")
            headers["authorization"] = f"Bearer {api_key}"
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            # Time is bounded around whole requests; of httpx's own bounds only this one is needed.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_keepalive_connections=max_concurrency, keepalive_expiry=KEEPALIVE_SECONDS),
            transport=transport,
        )
        self._slots = asyncio.Semaphore(max_concurrency)
        self._retry = retry
        self.attempt_timeout = attempt_timeout

    @property
    def base_url(self) -> httpx.URL:
        """Where the server is; a password in it is hidden by repr."""
        return self._http.base_url

    async def ask(
        self,
        method: str,
        path: str,
        content: bytes | None,
        deadline: float,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> httpx.Response:
        """A whole reply that is a success, after as many tries as it takes.

        Raises:
            ClientError: the last try's; or at once, where the wait for another would outlast the deadline.
        """
        async with no_later_than(deadline), self._slots:
            return await self._tries(method, path, content, deadline, headers, stream=False)

    async def open(
        self, path: str, content: bytes, deadline: float, headers: Mapping[str, str] = NO_HEADERS
    ) -> httpx.Response:
        """A reply that has begun, as server-sent events if the server has them; the caller reads and closes it.

        It takes no slot: whoever reads it may stop to ask for something else.

        Raises:
            ClientError: as `ask` does.
        """
        async with no_later_than(deadline):
            return await self._tries("POST", path, content, deadline, headers, stream=True)

    async def attempt(
        self,
        method: str,
        path: str,
        content: bytes | None,
        deadline: float,
        headers: Mapping[str, str] = NO_HEADERS,
        stream: bool = False,
    ) -> httpx.Response:
        """The reply to one try, whatever its status.

        Raises:
            NoReply: there is none.
        """
        seconds = min(self.attempt_timeout, max(0.001, deadline - asyncio.get_running_loop().time()))
        own = {"x-request-timeout": f"{seconds:.3f}"} | ({"accept": "text/event-stream"} if stream else {})
        request = self._http.build_request(method, path, content=content, headers={**headers, **own})
        async with expect_reply(self.attempt_timeout):
            response = await self._http.send(request, stream=stream)
            if not response.is_success:
                await response.aread()
        return response

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def _tries(
        self,
        method: str,
        path: str,
        content: bytes | None,
        deadline: float,
        headers: Mapping[str, str],
        stream: bool,
    ) -> httpx.Response:
        retries = 0
        while True:
            try:
                response = await self.attempt(method, path, content, deadline, headers, stream)
                if response.is_success:
                    return response
                raise from_reply(response.status_code, response.headers, response.content)
            except ClientError as error:
                wait = self._retry.wait(error, retries)
                if wait is None or asyncio.get_running_loop().time() + wait >= deadline:
                    raise
                logger.info("%s %s: %s, again in %.2f s", method, path, error.status or type(error).__name__, wait)
            await asyncio.sleep(wait)
            retries += 1
