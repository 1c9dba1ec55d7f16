"""Texts into as few requests as the server's limits allow.

Knows bodies and limits. Does not know tokens: it counts no fewer than there can be. Does not know HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.client.models import Limits


@dataclass(frozen=True)
class Text:
    """One text as JSON, and its place among the caller's."""

    index: int
    json: bytes = field(repr=False)


Batch = Sequence[Text]


def encode(texts: Iterable[str]) -> list[Text]:
    """Texts as they stand in a body.

    Raises:
        TypeError: one text instead of several, or something else than texts.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one text; give a list of texts")
    return [Text(index, _quoted(text)) for index, text in enumerate(texts)]


def body(batch: Batch, parameters: Mapping[str, Any]) -> bytes:
    """The request's body."""
    rest = b',"parameters":' + json.dumps(parameters, allow_nan=False).encode() if parameters else b""
    return b'{"inputs":[' + b",".join(text.json for text in batch) + b"]" + rest + b"}"


def split(texts: Iterable[Text], limits: Limits, overhead: int) -> Iterator[list[Text]]:
    """Batches within the limits, in order. A text that is too large by itself is a batch by itself: the server says so.

    Args:
        overhead: bytes of a body without texts.
    """
    batch: list[Text] = []
    size, tokens = overhead - 1, 0
    for text in texts:
        length = len(text.json) + 1  # a comma before each but the first
        # A token is at least one byte of its text, and the quotes stand for two special tokens.
        most = min(limits.max_input_tokens, len(text.json))
        if batch and (
            len(batch) == limits.max_batch_size
            or size + length > limits.max_body_bytes
            or tokens + most > limits.max_queue_tokens
        ):
            yield batch
            batch, size, tokens = [], overhead - 1, 0
        batch.append(text)
        size += length
        tokens += most
    if batch:
        yield batch


def _quoted(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"a text is {type(text).__name__}, not str")
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character: escaped, it reaches the server, which names the text
        return json.dumps(text).encode()
