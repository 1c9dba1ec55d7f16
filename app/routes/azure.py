"""Azure Machine Learning's contract: `POST /score`, which is `POST /summarize` by another name.

Its liveness and readiness routes are named in the deployment: `/health/live` and `/health/ready`.
"""

from __future__ import annotations

from fastapi import APIRouter

from app.routes.openapi import SUMMARIZE
from app.routes.summarize import summarize

router = APIRouter(tags=["azure ml"])
router.add_api_route("/score", summarize, methods=["POST"], **SUMMARIZE)
