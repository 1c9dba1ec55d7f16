"""`POST /summarize` (also `POST /`) and `POST /tokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.routes.answer import answer
from app.routes.openapi import SUMMARIZE, body, problems, success
from app.routes.request import parse, read_json, runtime_of, texts_of, unless_disconnected
from app.routes.streaming import answer_with_events, wants_stream
from app.schemas import SummarizeRequest, TokenCountItem, TokenizeRequest

router = APIRouter(tags=["summarization"])

_TOKENIZE_EXAMPLES = {"one text": {"value": {"inputs": "A text that may be too long."}}}
_COUNT_EXAMPLES = {"one text": {"value": [{"tokens": 534, "limit": 512, "excess": 22, "cut_at_char": 2417}]}}


@router.post("/summarize", **SUMMARIZE)
@router.post("/", include_in_schema=False)
async def summarize(request: Request) -> Response:
    """Summaries of one text or several, in input order; always a list. Texts over the limit are refused unless told.

    With `Accept: text/event-stream` or `"stream": true`, server-sent events: `delta` `{"index", "text"}` as soon as no
    decode step can change that part, `result` with each whole item, then `done`; or `error` with the problem body.
    """
    runtime_of(request).require_model()
    parsed = parse(SummarizeRequest, await read_json(request))
    texts, pointer = texts_of(parsed)
    if wants_stream(request, parsed.stream):
        return await answer_with_events(request, texts, pointer, parsed.parameters)
    answered = await answer(request, texts, pointer, parsed.parameters)
    return JSONResponse(answered.items(), headers=answered.headers)


@router.post(
    "/tokenize",
    response_model=list[TokenCountItem],
    responses={200: success(_COUNT_EXAMPLES), **problems(400, 406, 408, 413, 415, 422, 503)},
    openapi_extra=body(TokenizeRequest, _TOKENIZE_EXAMPLES),
)
async def tokenize(request: Request) -> Response:
    """Each text against the token limit, so that a client can check before it sends."""
    model = runtime_of(request).require_model()
    texts, pointer = texts_of(parse(TokenizeRequest, await read_json(request)))
    counts = await unless_disconnected(request, model.summarizer.count_tokens(texts, pointer))
    return JSONResponse([count.model_dump() for count in counts])
