"""KServe's protocol v1 (TensorFlow Serving's REST API): list, readiness and predictions of the one model."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from app.routes import instances
from app.routes.openapi import UNREADY_MODEL, problems
from app.routes.served_model import model_ready, name_of, require_served, served_entry
from app.schemas_platforms import ModelList, ModelReady

router = APIRouter(tags=["kserve v1"])
_PREDICT = instances.PREDICT | {"responses": instances.PREDICT["responses"] | problems(404)}


@router.get("/v1/models", responses=problems(503))
async def models(request: Request) -> ModelList:
    """The name of the model, for the paths below."""
    return ModelList(models=[name_of(served_entry(request))])


# Before the path below, whose template takes this one in: a wrong method is told what is allowed here.
@router.post("/v1/models/{name}:predict", **_PREDICT)
async def predict(request: Request, name: str) -> Response:
    """One prediction for each instance, in their order: the items of `POST /summarize`."""
    require_served(request, name)
    return await instances.predict(request)


@router.get("/v1/models/{name}", responses=UNREADY_MODEL | problems(405))
async def ready(request: Request, response: Response, name: str) -> ModelReady:
    """Whether the model takes requests."""
    if name.endswith(":predict"):
        raise HTTPException(405, headers={"Allow": "POST"})
    return model_ready(request, response, name)
