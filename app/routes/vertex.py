"""Vertex AI's contract: a predict and a health route, at the paths that the deployment names.

Knows the body. Does not know the AIP_* variables: `platforms.py` does.
"""

from __future__ import annotations

from fastapi import APIRouter

from app.routes.health import ready
from app.routes.instances import PREDICT, predict


def router(predict_route: str, health_route: str) -> APIRouter:
    """The two routes."""
    routes = APIRouter(tags=["vertex ai"])
    routes.add_api_route(predict_route, predict, methods=["POST"], **PREDICT)
    # Mostly an alias of /health, which is documented.
    routes.add_api_route(health_route, ready, methods=["GET"], include_in_schema=False)
    return routes
