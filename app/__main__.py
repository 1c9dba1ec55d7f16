"""`python -m app` starts the server; settings come from PRECIS_* and .env, see `settings.py`.

Owns the signals: at SIGTERM ready turns 503 while the listeners stay open for PRECIS_DRAIN_DELAY, then work in flight
finishes, and the process exits 0. Owns the end as well: without its engine thread the process is of no use and exits 3.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from pydantic import ValidationError

from app import logs, tracing
from app.auth import ApiKeys, check_exposure, parse_rate
from app.errors import InvalidSetting, ModelError
from app.main import create_app, greeting, load_model, served
from app.metrics import Metrics
from app.platforms import platform_settings
from app.protocol import Protocol
from app.runtime import Runtime
from app.settings import Settings

logger = logging.getLogger("app")


class Server(uvicorn.Server):
    """uvicorn that says it is leaving before it leaves, and ends without re-raising the signal."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime, url: str) -> None:
        super().__init__(config)
        self.runtime = runtime
        self.url = url
        self.engine_died = False
        self._leave_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started and self.runtime.settings.log_format == "json":
            logger.info("%s", served(self.runtime), extra={"url": self.url})
        elif self.started:
            print(greeting(self.runtime, self.url), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining; a second signal does not wait, a third not even for work in flight."""
        if self._leave_at is None and self.started:
            self._leave_at = time.monotonic() + self.runtime.settings.drain_delay
            self.runtime.draining = True
        elif self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        leave = self._leave_at is not None and time.monotonic() >= self._leave_at
        # The model is there once its engine has run. Who waited for the engine has been told already.
        self.engine_died = self.runtime.model is not None and not self.runtime.model.engine.alive
        if self.engine_died:
            logger.critical("the engine thread is dead: this process ends, so that its supervisor starts another")
        return await super().on_tick(counter) or leave or self.engine_died


def main() -> int:
    """Run until a signal; 0 after a clean end, 2 if the settings or the model are wrong, 3 if the engine died."""
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["serve"], help="how SageMaker starts a container")
    arguments = parser.parse_args()
    try:
        settings = Settings(**platform_settings(os.environ, serve=arguments.command == "serve"))
        check_exposure(settings, ApiKeys.from_settings(settings))
        parse_rate(settings.rate_limit)
    except (ModelError, InvalidSetting) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValidationError as error:
        for found in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in found["loc"]).upper()
            print(f"error: PRECIS_{name}: {found['msg']}", file=sys.stderr)
        return 2
    logs.configure(settings.log_level, settings.log_format)
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        return _refuse(settings, f"cannot listen on {settings.host}:{settings.port}: {error.strerror}")
    port = listener.getsockname()[1]
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    metrics = Metrics()
    try:
        model = load_model(settings, metrics)
    except ModelError as error:
        return _refuse(settings, str(error))
    except OSError as error:
        return _refuse(settings, f"the model cannot be read: {error}")
    spans = tracing.from_environment(os.environ)
    app = create_app(settings, lambda *_: model, metrics, spans)
    config = uvicorn.Config(
        app,
        # uvicorn does nothing with the class but call it, with keywords.
        http=cast(
            type[asyncio.Protocol],
            partial(Protocol, header_timeout=settings.header_timeout, reply_timeout=settings.body_timeout),
        ),
        ws="none",
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=settings.keep_alive_timeout,
        lifespan="on",
        access_log=False,
        server_header=False,
        log_level=settings.log_level,
        log_config=None,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
    )
    server = Server(config, app.state.runtime, url)
    server.run(sockets=[listener])
    spans.close()
    return 3 if server.engine_died else 0


def _refuse(settings: Settings, reason: str) -> int:
    """Say why there is no start; its exit status."""
    if settings.log_format == "json":
        logger.critical("%s", reason)
    else:
        print(f"error: {reason}", file=sys.stderr)
    return 2


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


if __name__ == "__main__":
    sys.exit(main())
