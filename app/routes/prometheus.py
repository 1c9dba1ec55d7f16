"""Prometheus reads here."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from app.metrics import CONTENT_TYPE
from app.routes.request import runtime_of

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Every metric in the text format."""
    return Response(runtime_of(request).metrics.render(), media_type=CONTENT_TYPE)
