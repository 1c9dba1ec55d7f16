"""Is the process alive, and should requests come here? Never needs a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from app.routes.request import runtime_of
from app.schemas import Health

router = APIRouter(tags=["health"])

UNREADY: dict[int | str, dict[str, Any]] = {
    503: {"model": Health, "description": "Starting, draining, or the engine gives no sign of life"}
}


@router.get("/health/live")
async def live() -> Health:
    """The process loop answers, whatever the queue."""
    return Health(status="ok")


@router.get("/health/ready", responses=UNREADY)
@router.get("/health", responses=UNREADY)
@router.get("/summarize/health", include_in_schema=False)
async def ready(request: Request, response: Response) -> Health:
    """Model loaded, warm, not draining, and the engine's heartbeat fresh."""
    status = runtime_of(request).status()
    response.status_code = 200 if status == "ok" else 503
    return Health(status=status)
