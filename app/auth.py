"""Who may call, and how often: API keys with names, and a rate for each of them.

Knows keys, paths that need none, and rates. Does not know what is asked for. Keys are compared as SHA-256 digests in
constant time, all of them each time; no key is ever logged or shown.
"""

from __future__ import annotations

import hmac
import ipaddress
import math
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InvalidSetting, RateLimited, Unauthorized
from app.settings import Settings

# Probes have no keys; the contract holds no secret.
OPEN_PATHS = frozenset(
    {
        "/health",
        "/health/live",
        "/health/ready",
        "/summarize/health",
        "/ping",
        "/v2/health/live",
        "/v2/health/ready",
        "/docs",
        "/openapi.json",
    }
)
SHORTEST_KEY = 16


class ApiKeys:
    """Names and digests."""

    def __init__(self, lines: Iterable[str]) -> None:
        """Read keys.

        Args:
            lines: `name:key` or `key` each; blank ones and those that begin with # are left out.

        Raises:
            InvalidSetting: a key is too short to be one, or a name or a key stands there twice.
        """
        self._digests: dict[str, bytes] = {}
        stripped = [line.strip() for line in lines]
        for number, line in enumerate((line for line in stripped if line and not line.startswith("#")), 1):
            name, _, key = line.rpartition(":")
            name = name.strip() or f"key-{number}"
            digest = _digest(key.strip())
            if len(key.strip()) < SHORTEST_KEY:
                raise InvalidSetting(f"API key {number} has fewer than {SHORTEST_KEY} characters.")
            if name in self._digests or digest in self._digests.values():
                raise InvalidSetting(f"API key {number} has the name or the value of another.")
            self._digests[name] = digest

    @classmethod
    def from_settings(cls, settings: Settings) -> ApiKeys:
        """The keys of PRECIS_API_KEYS and of the file PRECIS_API_KEYS_FILE.

        Raises:
            InvalidSetting: a key is wrong, or the file cannot be read.
        """
        lines = settings.api_keys.get_secret_value().split(",") if settings.api_keys else []
        if settings.api_keys_file is not None:
            lines += _read(settings.api_keys_file)
        return cls(lines)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, presented: str) -> str | None:
        """Whose key it is, or None."""
        digest = _digest(presented)
        found = None
        for name, known in self._digests.items():  # no early end: time must not tell how far it got
            if hmac.compare_digest(digest, known):
                found = name
        return found


def check_exposure(settings: Settings, keys: ApiKeys) -> None:
    """A server that strangers can reach has keys, or its operator said that it needs none.

    Raises:
        InvalidSetting: neither.
    """
    if keys or settings.allow_anonymous or _is_loopback(settings.host):
        return
    raise InvalidSetting(
        f"PRECIS_HOST is {settings.host}, which others can reach, and there are no API keys: set PRECIS_API_KEYS or "
        "PRECIS_API_KEYS_FILE, or PRECIS_ALLOW_ANONYMOUS=true where something in front decides who may call."
    )


class AuthMiddleware:
    """Lets a request pass that needs no key or has one, and that is within its caller's rate."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, rate: RateLimitItem | None, open_paths: Iterable[str]) -> None:
        self.app = app
        self.keys = keys
        self.rate = rate
        self.open_paths = frozenset(open_paths)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            Unauthorized: no key, or none of ours.
            RateLimited: too many requests in this window.
        """
        if scope["type"] != "http" or scope["path"] in self.open_paths:
            await self.app(scope, receive, send)
            return
        caller = self._caller(scope)
        if self.rate is None:
            await self.app(scope, receive, send)
            return
        allowed = await self._limiter.hit(self.rate, caller)
        reset, remaining = await self._limiter.get_window_stats(self.rate, caller)
        seconds = max(1, math.ceil(reset - time.time()))
        headers = rate_headers(self.rate, remaining, seconds)
        if not allowed:
            raise RateLimited(f"The rate is {self.rate}; try again in {seconds} s.", seconds, headers)

        async def send_with_rate(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        await self.app(scope, receive, send_with_rate)

    def _caller(self, scope: Scope) -> str:
        """The name of the request's key; where there are no keys, its address."""
        if not self.keys:  # a client may send its own hub token: nobody asked for it, nobody looks at it
            return str((scope.get("client") or ("unknown",))[0])
        name = self.keys.name_of(presented_key(Headers(scope=scope)))
        if name is None:
            raise Unauthorized("This server needs an API key: send Authorization: Bearer KEY, or X-API-Key: KEY.")
        return name


def presented_key(headers: Headers) -> str:
    """What the request shows as its key; empty if nothing."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def parse_rate(rate: str | None) -> RateLimitItem | None:
    """`600/minute` and the like, as the `limits` library reads it.

    Raises:
        InvalidSetting: it is none.
    """
    try:
        return None if rate is None else parse(rate)
    except ValueError as error:
        raise InvalidSetting(f"PRECIS_RATE_LIMIT is {rate!r}, not a rate such as 600/minute.") from error


def rate_headers(rate: RateLimitItem, remaining: int, seconds: int) -> dict[str, str]:
    """As Hugging Face's clients parse them."""
    return {
        "ratelimit": f'"api";r={remaining};t={seconds}',
        "ratelimit-policy": f'"fixed window";"api";q={rate.amount};w={rate.get_expiry()}',
    }


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"PRECIS_API_KEYS_FILE cannot be read: {file}: {type(error).__name__}.") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
