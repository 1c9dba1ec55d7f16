"""What is served, and how."""

from __future__ import annotations

import dataclasses

from fastapi import APIRouter, Request

from app.routes.openapi import problems
from app.routes.request import runtime_of
from app.schemas import Info, ModelFacts

router = APIRouter(tags=["info"])


@router.get("/info", responses=problems(503))
@router.get("/summarize/info", include_in_schema=False)
async def info(request: Request) -> Info:
    """Model, limits, defaults, settings (secrets hidden) and library versions."""
    runtime = runtime_of(request)
    model = runtime.require_model()
    return Info(
        model_id=model.entry.name,
        model=ModelFacts(
            name=model.entry.name,
            version=model.entry.version,
            revision=model.entry.revision,
            verified=model.entry.verified,
            parameters=model.num_parameters,
        ),
        device=model.device,
        dtype=model.dtype,
        limits=model.limits,
        defaults=dataclasses.asdict(model.summarizer.defaults),
        settings=runtime.settings.model_dump(mode="json"),
        versions=runtime.versions,
    )
