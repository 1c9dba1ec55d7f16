"""`{"instances": [...]}` -> `{"predictions": [...]}`: the body that Vertex AI and KServe's protocol v1 share.

Knows that body. Does not know paths or model names.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from app.routes.answer import answer
from app.routes.openapi import CONVERSATION, SUMMARY, WORK_ERRORS, body, problems, success
from app.routes.request import parse, read_json
from app.schemas_platforms import PredictReply, PredictRequest

_REQUEST_EXAMPLES = {
    "texts": {"value": {"instances": [CONVERSATION, "A second text."], "parameters": {"num_beams": 4}}},
    "objects": {"value": {"instances": [{"inputs": CONVERSATION}]}},
}
PREDICT: dict[str, Any] = {
    "response_model": PredictReply,
    "responses": {
        200: success({"one instance": {"value": {"predictions": [SUMMARY]}}}),
        **problems(*WORK_ERRORS),
    },
    "openapi_extra": body(PredictRequest, _REQUEST_EXAMPLES),
}


async def predict(request: Request) -> Response:
    """One prediction for each instance, in their order: the items of `POST /summarize`."""
    asked = parse(PredictRequest, await read_json(request))
    texts = [instance if isinstance(instance, str) else instance.inputs for instance in asked.instances]
    answered = await answer(request, texts, lambda index: f"/instances/{index}", asked.parameters)
    return JSONResponse({"predictions": answered.items()}, headers=answered.headers)
