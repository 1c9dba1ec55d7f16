"""`python -m app.healthcheck` asks the server in the same container whether it is ready: exit status 0 or 1.

Knows where the container's first process listens: its port is a setting, and a platform's word goes before it. Does not
know what ready means. An image's HEALTHCHECK runs it every few seconds, so it imports neither torch nor FastAPI.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from app.platforms import platform_settings

DEFAULT_PORT = 8000
TIMEOUT = 4.0  # seconds; less than the image's own
FIRST_PROCESS = Path("/proc/1/cmdline")


def port(environment: Mapping[str, str], arguments: list[str]) -> int:
    """Where a server listens that was started with these arguments in this environment."""
    decided = platform_settings(environment, serve="serve" in arguments).get("port")
    return int(decided or environment.get("PRECIS_PORT") or DEFAULT_PORT)


def ready(port: int, timeout: float = TIMEOUT) -> tuple[bool, str]:
    """Whether the server on this port takes work, and in which words it said so or did not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", "/health/ready")
        reply = connection.getresponse()
        return reply.status == http.client.OK, f"{reply.status} {reply.read(500).decode(errors='replace')}"
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer on port {port}: {error}"
    finally:
        connection.close()


def main() -> int:
    """0 if the server is ready, else 1."""
    try:
        arguments = FIRST_PROCESS.read_text().split("\0")
    except OSError:  # no /proc
        arguments = []
    is_ready, words = ready(port(os.environ, arguments))
    print(words)
    return 0 if is_ready else 1


if __name__ == "__main__":
    sys.exit(main())
