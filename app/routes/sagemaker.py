"""Amazon SageMaker's contract: `GET /ping` and `POST /invocations`, which is `POST /summarize` by another name."""

from __future__ import annotations

from fastapi import APIRouter

from app.routes.health import UNREADY, ready
from app.routes.openapi import SUMMARIZE
from app.routes.summarize import summarize

router = APIRouter(tags=["sagemaker"])
router.add_api_route("/ping", ready, methods=["GET"], responses=UNREADY)
router.add_api_route("/invocations", summarize, methods=["POST"], **SUMMARIZE)
