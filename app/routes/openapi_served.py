"""What OpenAPI says of this server alone: its limits on single fields, and the name and version of its model.

Knows the document and the loaded model. Does not know routes.
"""

from __future__ import annotations

from typing import Any

from app.routes.served_model import name_of
from app.runtime import LoadedModel
from app.summarizer import TOKEN_OPTIONS

_DECODE_OPTIONS = ("GenerateParameters", "Parameters", "InferParameters")
_TEXTS = (
    ("SummarizeRequest", "inputs"),
    ("SummarizeRequest", "text"),
    ("TokenizeRequest", "inputs"),
    ("TokenizeRequest", "text"),
    ("PredictRequest", "instances"),
    ("InputTensor", "data"),
)


def add_limits(schemas: dict[str, Any], model: LoadedModel) -> None:
    """Set the largest number of texts, beams and tokens, and the largest token id, in the schemas of bodies."""
    limits = model.limits
    largest = {
        "num_beams": limits.max_num_beams,
        "num_beam_groups": limits.max_num_beams,
        "num_return_sequences": limits.max_num_beams,
        "max_new_tokens": limits.max_output_tokens,
        "min_new_tokens": limits.max_output_tokens,
        "max_length": limits.max_output_tokens + 1,
        "min_length": limits.max_output_tokens + 1,
        **dict.fromkeys(TOKEN_OPTIONS, model.summarizer.limits.vocab_size - 1),
    }
    for name in _DECODE_OPTIONS:
        for option, limit in largest.items():
            _limit_numbers(schemas[name]["properties"][option], limit)
    for name, field in _TEXTS:
        _limit_items(schemas[name]["properties"][field], limits.max_batch_size)
    _limit_numbers(schemas["InputTensor"]["properties"]["shape"], limits.max_batch_size)


def add_names(paths: dict[str, Any], model: LoadedModel) -> None:
    """Say what stands for `{name}` and `{version}` in paths: everything else is 404."""
    served = {"name": name_of(model.entry), "version": model.entry.version}
    for operations in paths.values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["schema"] = {"type": "string", "enum": [served[parameter["name"]]]}


def _limit_numbers(schema: dict[str, Any], limit: int) -> None:
    """At the integers of a field, be they in lists or not."""
    if schema.get("type") == "integer":
        schema["maximum"] = limit
    for part in (*schema.get("anyOf", ()), schema.get("items", {})):
        if part:
            _limit_numbers(part, limit)


def _limit_items(schema: dict[str, Any], limit: int) -> None:
    """At the list that a field is or may be; not at lists in it."""
    if schema.get("type") == "array":
        schema["maxItems"] = limit
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        _limit_items(part, limit)
