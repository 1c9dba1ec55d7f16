"""Request and response bodies, in the shapes that existing clients speak, with what OpenAPI says of them.

Knows types and ranges. Does not know the server's limits, a checkpoint's defaults, or which options are at odds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Truncation = Literal["do_not_truncate", "longest_first", "only_first", "only_second"]
Overflow = Literal["error", "truncate_tail", "truncate_head", "chunk"]

# Tags of the union below; they are no part of a body and are left out of JSON pointers.
_ONE, _MANY = "one text", "texts"
TAGS = frozenset({_ONE, _MANY})


def _one_or_many(value: Any) -> str | None:
    return _ONE if isinstance(value, str) else _MANY if isinstance(value, list) else None


Inputs = Annotated[
    Annotated[str, Tag(_ONE)] | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag(_MANY)],
    Discriminator(
        _one_or_many, custom_error_type="inputs_type", custom_error_message="Input should be a text or a list of texts"
    ),
]


class Body(BaseModel):
    """Strict: no unknown key, no type conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


class GenerateParameters(Body):
    """How summaries are decoded; names and meanings are those of transformers' `generate`.

    What is not given comes from the checkpoint's `generation_config.json`. A length given here replaces both forms of
    the same bound there.
    """

    num_beams: Annotated[int | None, Field(ge=1, description="Beams; 1 is greedy decoding.")] = None
    num_return_sequences: Annotated[int | None, Field(ge=1, description="At most num_beams.")] = None
    max_length: Annotated[int | None, Field(ge=2, description="max_new_tokens + 1: counts the start token.")] = None
    max_new_tokens: Annotated[int | None, Field(ge=1, description="Most tokens, end token included.")] = None
    min_length: Annotated[int | None, Field(ge=0, description="min_new_tokens + 1: counts the start token.")] = None
    min_new_tokens: Annotated[int | None, Field(ge=0, description="No end token before this many tokens.")] = None
    length_penalty: Annotated[
        float | None,
        Field(ge=-2, le=10, description="A hypothesis scores sum_log_probs / tokens ** length_penalty."),
    ] = None
    early_stopping: Annotated[Literal[True, False, "never"] | None, Field(description="When beam search stops.")] = None
    no_repeat_ngram_size: Annotated[
        int | None, Field(ge=0, le=1000, description="No n-gram of this size twice; 0 is off.")
    ] = None
    repetition_penalty: Annotated[
        float | None, Field(ge=0.01, le=100, description="Above 1: says less twice; 1 is off.")
    ] = None


class Parameters(GenerateParameters):
    """Decode options may also stand here directly, as old handlers had them; a conflict is refused."""

    truncation: Annotated[
        Truncation | None,
        Field(description="`longest_first`, `only_first`: cut the end of a text over the limit; others refuse it."),
    ] = None
    overflow: Annotated[
        Overflow | None,
        Field(
            description="What happens to a text over the limit: refuse (default), drop its end, drop its beginning. "
            "`chunk` is reserved and answers 422."
        ),
    ] = None
    clean_up_tokenization_spaces: Annotated[
        bool | None, Field(description="No space before punctuation. Default: as the checkpoint's tokenizer does.")
    ] = None
    generate_parameters: GenerateParameters | None = None
    return_: Annotated[
        list[Literal["tokens", "alternatives"]] | None,
        Field(alias="return", description="`tokens` adds token_ids; `alternatives` adds every returned hypothesis."),
    ] = None


class SummarizeRequest(Body):
    """The request of Hugging Face's summarisation task."""

    inputs: Annotated[Inputs | None, Field(description="One text or several.")] = None
    text: Annotated[Inputs | None, Field(description="Old name of `inputs`; give one of them.")] = None
    parameters: Parameters | None = None


class TokenizeRequest(Body):
    """Texts to hold against the token limit."""

    inputs: Annotated[Inputs | None, Field(description="One text or several.")] = None
    text: Annotated[Inputs | None, Field(description="Old name of `inputs`; give one of them.")] = None


class Alternative(BaseModel):
    """One hypothesis."""

    summary_text: str
    score: Annotated[
        float,
        Field(description="Beams: sum of log-probabilities / tokens ** length_penalty. Greedy: mean log-probability."),
    ]
    finish_reason: Annotated[Literal["eos", "length"], Field(description="Ended by the model, or by the length limit.")]
    output_tokens: Annotated[int, Field(description="Tokens of the summary, end token included.")]
    token_ids: Annotated[
        list[int] | None, Field(description="On request: ids after the start token, end token included.")
    ] = None


class Summary(Alternative):
    """The best hypothesis of one text."""

    input_tokens: Annotated[int, Field(description="Tokens encoded, special tokens included.")]
    source_tokens: Annotated[int, Field(description="Tokens of the text before any cut, special tokens included.")]
    truncated: Annotated[bool, Field(description="Whether a part of the text was cut off.")]
    alternatives: Annotated[
        list[Alternative] | None, Field(description="All returned hypotheses, best first; with several, or on request.")
    ] = None


class TokenCountItem(BaseModel):
    """A text held against the token limit."""

    tokens: Annotated[int, Field(description="Special tokens included.")]
    limit: int
    excess: Annotated[int, Field(description="Tokens over the limit; 0 if the text fits.")]
    cut_at_char: Annotated[
        int | None, Field(description="The first so many code points fit; null if the whole text does.")
    ] = None


class Problem(BaseModel):
    """Every error's body: RFC 9457, and the keys that Hugging Face's clients read."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: Annotated[str, Field(description="The detail again.")]
    error_type: str
    errors: Annotated[
        list[dict[str, Any]], Field(description="Each offending place: `message`, `pointer` and what else helps.")
    ] = []


class Health(BaseModel):
    """One word, and why."""

    status: Literal["ok", "starting", "draining", "failed"]


class ModelFacts(BaseModel):
    """Which model answers."""

    name: str
    version: str
    revision: Annotated[str, Field(description="sha256 over the hashes of its files.")]
    verified: Annotated[bool, Field(description="Whether a manifest vouched for its files.")]
    parameters: int


class Limits(BaseModel):
    """What a request may ask for."""

    max_input_tokens: int
    max_output_tokens: int
    max_num_beams: int
    max_batch_size: int
    max_body_bytes: int
    max_queue_tokens: int


class Info(BaseModel):
    """What is served, and how."""

    model_id: str
    task: Literal["summarization"] = "summarization"
    model: ModelFacts
    device: str
    dtype: str
    limits: Limits
    defaults: Annotated[dict[str, Any], Field(description="Decode options of a request that gives none.")]
    settings: Annotated[dict[str, Any], Field(description="Every setting; secrets hidden.")]
    versions: Annotated[dict[str, str], Field(description="Of the libraries that results depend on.")]
