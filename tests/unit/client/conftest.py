"""Coroutine tests run on asyncio, by anyio's plugin; and nobody's key is around."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRECIS_API_KEY", raising=False)
