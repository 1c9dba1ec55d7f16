"""What the client gives back.

Knows the replies' shapes. Does not know the server's schemas: importing them would import torch. Keys that a newer
server adds are kept as attributes.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Read-only, and open to keys that this version does not know."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Alternative(Reply):
    """One hypothesis.

    Attributes:
        score: with beams, the sum of log-probabilities / tokens ** length_penalty; else their mean.
        finish_reason: "eos" if the model ended it, "length" if the limit did.
        output_tokens: tokens of the summary, end token included.
        token_ids: with `with_tokens`; ids after the start token, end token included.
        token_logprobs: with `with_tokens`; one for each of token_ids.
    """

    summary_text: str
    score: float
    finish_reason: str
    output_tokens: int
    token_ids: list[int] | None = None
    token_logprobs: list[float] | None = None


class Summary(Alternative):
    """The best hypothesis of one text.

    Attributes:
        input_tokens: tokens encoded, special tokens included.
        source_tokens: tokens of the text before any cut, special tokens included.
        truncated: whether a part of the text was cut off.
        alternatives: all returned hypotheses, best first; with several, or with `with_alternatives`.
    """

    input_tokens: int
    source_tokens: int
    truncated: bool
    alternatives: list[Alternative] | None = None


class Delta(Reply):
    """The next piece of a summary that is being written.

    Attributes:
        index: of its text among the caller's.
    """

    text: str
    index: int = 0


class StreamedSummary(Summary):
    """A summary that ends a stream of pieces.

    Attributes:
        index: of its text among the caller's.
    """

    index: int = 0


class TokenCount(Reply):
    """A text held against the token limit.

    Attributes:
        tokens: special tokens included.
        excess: tokens over the limit; 0 if the text fits.
        cut_at_char: the first so many code points fit; None if the whole text does.
    """

    tokens: int
    limit: int
    excess: int
    cut_at_char: int | None = None


class Health(Reply):
    """One word: "ok", or why not."""

    status: str


class Limits(Reply):
    """What one request may hold."""

    max_input_tokens: int
    max_batch_size: int
    max_body_bytes: int
    max_queue_tokens: int


class Info(Reply):
    """What is served. More keys are there as attributes: model, settings, versions and others."""

    model_id: str
    device: str
    dtype: str
    limits: Limits
    defaults: dict[str, Any]
