"""What OpenAPI says beyond FastAPI's own reading: bodies parsed by hand, error replies, examples, headers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.auth import OPEN_PATHS
from app.exception_handlers import PROBLEM_JSON, REPLIES
from app.routes.openapi_served import add_limits, add_names
from app.schemas import Problem, SummarizeRequest, Summary, TokenizeRequest
from app.schemas_platforms import InferRequest, ModelReady, PredictRequest

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
    "three samples": {
        "value": {
            "inputs": CONVERSATION,
            "parameters": {
                "generate_parameters": {
                    "do_sample": True,
                    "num_beams": 1,
                    "num_return_sequences": 3,
                    "temperature": 0.8,
                    "top_p": 0.9,
                    "seed": 7,
                }
            },
        }
    },
    "diverse beams": {
        "value": {
            "inputs": CONVERSATION,
            "parameters": {
                "generate_parameters": {
                    "num_beams": 6,
                    "num_beam_groups": 3,
                    "diversity_penalty": 0.5,
                    "num_return_sequences": 3,
                }
            },
        }
    },
    "words that must not be said": {
        "value": {
            "inputs": CONVERSATION,
            "parameters": {
                "generate_parameters": {"bad_words_ids": [[3892], [2651, 1012]], "suppress_tokens": [9432]},
            },
        }
    },
}
SUMMARY = {
    "summary_text": "anna is out.",
    "score": -0.42,
    "finish_reason": "eos",
    "input_tokens": 68,
    "source_tokens": 68,
    "output_tokens": 5,
    "truncated": False,
}
_TOKENS = {
    "token_ids": [4698, 2003, 2041, 1012, 102],
    "token_logprobs": [-0.81, -0.22, -0.95, -0.1, -0.02],
}
SUMMARY_EXAMPLES = {
    "one text": {"value": [SUMMARY]},
    "with tokens": {"value": [SUMMARY | _TOKENS]},
}
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
    400: "Not HTTP, or not JSON",
    401: "No API key, or none of ours; where the server has keys",
    404: "No such model, or version",
    405: "Another method's path",
    406: "Accept names neither JSON nor events",
    408: "The head or the body did not arrive in time",
    413: "A text over the token limit, too many texts, or too large a body",
    415: "Not declared as JSON",
    422: "Schema, parameters, or a text that cannot be summarised",
    429: "Queue full, or too many requests of one key or address; see Retry-After",
    431: "Too large a head",
    500: "Generation failed, or another fault of the server",
    501: "Another Transfer-Encoding than chunked",
    503: "Not ready, or stopping",
    504: "Not done within X-Request-Timeout, or the server's longest time",
}

# What can go wrong between a body and its summaries, whatever the protocol.
WORK_ERRORS = (400, 406, 408, 413, 415, 422, 429, 500, 503, 504)
# What any request may meet, and what those meet that need a key.
_COMMON_ERRORS = (400, 408, 431, 500, 501)
_KEYED_ERRORS = (401, 429)
_ERROR_HEADERS = {
    "x-request-id": HEADERS["x-request-id"],
    "x-error-message": "The detail again, in printable ASCII.",
    "x-error-type": "The body's error_type.",
}


def body(model: type[BaseModel], examples: dict[str, Any]) -> dict[str, Any]:
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
        described = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": examples}
        replies[status] = {
            "description": _MEANING[status],
            "headers": _text_headers(_ERROR_HEADERS),
            # The second where Accept asks for it.
            "content": {PROBLEM_JSON: described, "application/json": described},
        }
    for status in {429, 503} & set(statuses):
        replies[status]["headers"]["retry-after"] = {"schema": {"type": "integer"}, "description": "Seconds."}
    if 401 in statuses:
        replies[401]["headers"] |= _text_headers({"www-authenticate": "Bearer."})
    if 405 in statuses:
        replies[405]["headers"] |= _text_headers({"allow": "The methods of this path."})
    return replies


def _text_headers(descriptions: dict[str, str]) -> dict[str, Any]:
    return {name: {"schema": {"type": "string"}, "description": text} for name, text in descriptions.items()}


def success(examples: dict[str, Any]) -> dict[str, Any]:
    """The reply of a route, with its headers."""
    return {
        "headers": _text_headers(HEADERS),
        "content": {"application/json": {"examples": examples}},
    }


def with_events(reply: dict[str, Any]) -> dict[str, Any]:
    """The same reply, or server-sent events."""
    example = (
        'event: delta\ndata: {"index": 0, "text": "anna is "}\n\nevent: delta\ndata: {"index": 0, "text": "out."}\n\n'
        'event: result\ndata: {"index": 0, "summary_text": "anna is out.", ...}\n\nevent: done\ndata: {}\n\n'
    )
    index = {"type": "integer", "minimum": 0, "description": "Of the text."}
    indexed = {"type": "object", "required": ["index"], "properties": {"index": index}}
    delta = indexed | {"required": ["index", "text"], "properties": {"index": index, "text": {"type": "string"}}}
    kinds = [
        _event("delta", delta),
        _event("result", {"allOf": [indexed, {"$ref": "#/components/schemas/Summary"}]}),
        _event("error", {"$ref": "#/components/schemas/Problem"}),
        _event("done", {"type": "object", "maxProperties": 0}),
    ]
    # OpenAPI 3.2's word for the schema of one event; FastAPI uses it too.
    events = {"itemSchema": {"oneOf": kinds}, "example": example}
    return {**reply, "content": {**reply["content"], "text/event-stream": events}}


def _event(name: str, data: dict[str, Any]) -> dict[str, Any]:
    content = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "required": ["event", "data"], "properties": {"event": {"const": name}, "data": content}}


# What OpenAPI says of `summarize`, for each path that leads to it.
SUMMARIZE: dict[str, Any] = {
    "response_model": list[Summary],
    "responses": {
        200: with_events(success(SUMMARY_EXAMPLES)),
        **problems(*WORK_ERRORS),
    },
    "openapi_extra": body(SummarizeRequest, REQUEST_EXAMPLES),
}


def _unready_model() -> dict[int | str, dict[str, Any]]:
    replies = problems(404, 503)
    replies[503]["description"] = "Requests should not come here now; a problem as long as there is no model at all"
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (ModelReady, Problem)]
    replies[503]["content"]["application/json"] = {"schema": {"anyOf": schemas}}
    return replies


# Of a route that says whether the model takes requests.
UNREADY_MODEL = _unready_model()


def install(app: FastAPI) -> None:
    """Add what no route names in its signature: schemas, what any request may meet, and this server's limits."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        bodies = (SummarizeRequest, TokenizeRequest, PredictRequest, InferRequest)
        _, extra = models_json_schema(
            [*((model, "validation") for model in bodies), (Problem, "serialization")],
            ref_template="#/components/schemas/{model}",
        )
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(extra["$defs"])
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's body of an error, which nobody sends here
            schemas.pop(name, None)
        runtime = app.state.runtime
        _add_common_errors(schema["paths"], {*OPEN_PATHS, runtime.settings.health_route})
        if runtime.model is not None:
            add_limits(schemas, runtime.model)
            add_names(schema["paths"], runtime.model)
            app.openapi_schema = schema
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_common_errors(paths: dict[str, Any], open_paths: set[str]) -> None:
    for path, operations in paths.items():
        statuses = _COMMON_ERRORS if path in open_paths else (*_COMMON_ERRORS, *_KEYED_ERRORS)
        for method, operation in operations.items():
            replies = operation["responses"]
            if method == "get":  # FastAPI's own, for parameters that are not what they should be: names are any text
                replies.pop("422", None)
            for status, reply in problems(*statuses).items():
                replies.setdefault(str(status), reply)
