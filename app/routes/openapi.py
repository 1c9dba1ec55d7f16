"""What OpenAPI says beyond FastAPI's own reading: bodies parsed by hand, error replies, examples, headers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from app.exception_handlers import PROBLEM_JSON, REPLIES
from app.schemas import Problem, SummarizeRequest, TokenizeRequest

CONVERSATION = (
    "#Person1#: Have you finished the report?\n"
    "#Person2#: Almost. I still need the sales figures from Anna.\n"
    "#Person1#: She is out until Thursday. Ask Tom for them, he has the same numbers.\n"
    "#Person2#: Good idea. Then you will have it tonight."
)

REQUEST_EXAMPLES = {
    "one text": {"value": {"inputs": CONVERSATION}},
    "several, with options": {
        "value": {
            "inputs": [CONVERSATION, "A second text."],
            "parameters": {
                "overflow": "truncate_tail",
                "generate_parameters": {"num_beams": 4, "max_new_tokens": 60, "length_penalty": 1.0},
                "return": ["tokens"],
            },
        }
    },
}
SUMMARY_EXAMPLE = [
    {
        "summary_text": "#person2# will ask tom for the sales figures and finish the report tonight.",
        "score": -0.42,
        "finish_reason": "eos",
        "input_tokens": 68,
        "source_tokens": 68,
        "output_tokens": 17,
        "truncated": False,
    }
]
HEADERS = {
    "x-request-id": "The request's id, as sent (at most 128 printable characters) or made here.",
    "x-total-time": "Milliseconds from the first byte of the request.",
    "x-compute-time": "Milliseconds of work: tokenisation and inference.",
    "x-compute-tokens": "Tokens encoded.",
    "x-tokenization-time": "Milliseconds.",
    "x-queue-time": "Milliseconds; of several texts the longest.",
    "x-inference-time": "Milliseconds; of several texts the longest.",
    "x-hf-warning": "`topic; message`, when a text was cut.",
}
_MEANING = {
    400: "Not JSON",
    408: "The body did not arrive in time",
    413: "A text over the token limit, too many texts, or too large a body",
    415: "Not declared as JSON",
    422: "Schema, parameters, or a text that cannot be summarised",
    429: "Queue full; see Retry-After",
    500: "Generation failed",
    503: "Not ready, or stopping",
}


def body(model: type[SummarizeRequest] | type[TokenizeRequest], examples: dict[str, Any]) -> dict[str, Any]:
    """The request body of a route that reads it itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}}
    }


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error replies of a route."""
    replies: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        examples = {
            reply.slug: {
                "value": {
                    "type": f"/problems/{reply.slug}",
                    "title": reply.title,
                    "status": status,
                    "detail": "...",
                    "instance": "urn:request:5f0c0c7d",
                    "error": "...",
                    "error_type": reply.error_type,
                    "errors": [],
                }
            }
            for reply in REPLIES.values()
            if reply.status == status
        }
        schema = {"$ref": "#/components/schemas/Problem"}
        replies[status] = {
            "description": _MEANING[status],
            "content": {PROBLEM_JSON: {"schema": schema, "examples": examples}},
        }
    if 429 in statuses:
        replies[429]["headers"] = {"retry-after": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return replies


def success(example: Any) -> dict[str, Any]:
    """The reply of a route, with its headers."""
    return {
        "headers": {name: {"schema": {"type": "string"}, "description": text} for name, text in HEADERS.items()},
        "content": {"application/json": {"example": example}},
    }


def install(app: FastAPI) -> None:
    """Add the schemas that no route names in its signature."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            _, extra = models_json_schema(
                [(SummarizeRequest, "validation"), (TokenizeRequest, "validation"), (Problem, "serialization")],
                ref_template="#/components/schemas/{model}",
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(extra["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
