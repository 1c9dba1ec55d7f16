"""`POST /summarize` (also `POST /`) and `POST /tokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.exception_handlers import header_safe
from app.middleware import milliseconds
from app.routes.openapi import REQUEST_EXAMPLES, SUMMARY_EXAMPLE, body, problems, success
from app.routes.request import parse, read_json, runtime_of, texts_of, unless_disconnected
from app.schemas import SummarizeRequest, Summary, TokenCountItem, TokenizeRequest
from app.summarizer import Timings
from app.tokenization import label

router = APIRouter(tags=["summarization"])

_TOKENIZE_EXAMPLES = {"one text": {"value": {"inputs": "A text that may be too long."}}}
_COUNT_EXAMPLE = [{"tokens": 534, "limit": 512, "excess": 22, "cut_at_char": 2417}]


@router.post(
    "/summarize",
    response_model=list[Summary],
    responses={200: success(SUMMARY_EXAMPLE), **problems(400, 408, 413, 415, 422, 429, 500, 503)},
    openapi_extra=body(SummarizeRequest, REQUEST_EXAMPLES),
)
@router.post("/", include_in_schema=False)
async def summarize(request: Request) -> Response:
    """Summaries of one text or several, in input order; always a list. Texts over the limit are refused unless told."""
    model = runtime_of(request).require_model()
    parsed = parse(SummarizeRequest, await read_json(request))
    texts, pointer = texts_of(parsed)
    options = model.summarizer.options(parsed.parameters)
    summaries, timings = await unless_disconnected(request, model.summarizer.summarize(texts, options, pointer))
    headers = _timing_headers(timings)
    cut = ", ".join(label(pointer(index)) for index, summary in enumerate(summaries) if summary.truncated)
    if cut:
        headers["x-hf-warning"] = header_safe(f"truncation; {cut} cut to {model.limits.max_input_tokens} tokens")
    return JSONResponse([summary.model_dump(exclude_none=True) for summary in summaries], headers=headers)


@router.post(
    "/tokenize",
    response_model=list[TokenCountItem],
    responses={200: success(_COUNT_EXAMPLE), **problems(400, 408, 413, 415, 422, 503)},
    openapi_extra=body(TokenizeRequest, _TOKENIZE_EXAMPLES),
)
async def tokenize(request: Request) -> Response:
    """Each text against the token limit, so that a client can check before it sends."""
    model = runtime_of(request).require_model()
    texts, pointer = texts_of(parse(TokenizeRequest, await read_json(request)))
    counts = await unless_disconnected(request, model.summarizer.count_tokens(texts, pointer))
    return JSONResponse([count.model_dump() for count in counts])


def _timing_headers(timings: Timings) -> dict[str, str]:
    return {
        "x-compute-time": milliseconds(timings.tokenization + timings.inference),
        "x-compute-tokens": str(timings.tokens),
        "x-tokenization-time": milliseconds(timings.tokenization),
        "x-queue-time": milliseconds(timings.queue),
        "x-inference-time": milliseconds(timings.inference),
    }
