"""`python -m app` starts the server; settings come from PRECIS_* and .env, see `settings.py`.

Owns the signals: at SIGTERM ready turns 503 while the listeners stay open for PRECIS_DRAIN_DELAY, then work in flight
finishes, and the process exits 0.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn
from pydantic import ValidationError

from app.errors import ModelError
from app.main import create_app, greeting, load_model
from app.metrics import Metrics
from app.runtime import Runtime
from app.settings import Settings


class Server(uvicorn.Server):
    """uvicorn that says it is leaving before it leaves, and ends without re-raising the signal."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime, url: str) -> None:
        super().__init__(config)
        self.runtime = runtime
        self.url = url
        self._leave_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
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
        return await super().on_tick(counter) or leave


def main() -> int:
    """Run until a signal; 0 after a clean end, 2 if the settings or the model are wrong."""
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    parser.parse_args()
    try:
        settings = Settings()
    except ValidationError as error:
        for found in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in found["loc"]).upper()
            print(f"error: PRECIS_{name}: {found['msg']}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        print(f"error: cannot listen on {settings.host}:{settings.port}: {error.strerror}", file=sys.stderr)
        return 2
    port = listener.getsockname()[1]
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    metrics = Metrics()
    try:
        model = load_model(settings, metrics)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    app = create_app(settings, lambda *_: model, metrics)
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=False,
        server_header=False,
        log_level=settings.log_level,
        log_config=None,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
    )
    Server(config, app.state.runtime, url).run(sockets=[listener])
    return 0


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
