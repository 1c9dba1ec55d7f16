"""Request and response bodies, in the shapes that existing clients speak, with what OpenAPI says of them.

Knows types and ranges. Does not know the server's limits, a checkpoint's defaults, or which options are at odds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from app.engine.config import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_SUPPRESSED_TOKENS

Truncation = Literal["do_not_truncate", "longest_first", "only_first", "only_second"]
Overflow = Literal["error", "truncate_tail", "truncate_head", "chunk"]

# Tags of unions, here and in schemas_platforms.py; they are no part of a body and are left out of JSON pointers.
TEXT, TEXTS, OBJECT = "one text", "texts", "an object"
TAGS = frozenset({TEXT, TEXTS, OBJECT})


def kind_of(value: Any) -> str | None:
    """Which member of a union a part of a body is meant to be."""
    return next((tag for kind, tag in ((str, TEXT), (list, TEXTS), (dict, OBJECT)) if isinstance(value, kind)), None)


_TEXT_OR_TEXTS = Discriminator(
    kind_of, custom_error_type="inputs_type", custom_error_message="Input should be a text or a list of texts"
)
# A text to summarise. That it is not empty is checked where blank ones are: for the schema only.
Text = Annotated[str, Field(json_schema_extra={"minLength": 1})]
Inputs = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(TEXTS)],
    _TEXT_OR_TEXTS,
]
AnyInputs = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag(TEXTS)], _TEXT_OR_TEXTS
]


def _no_number(value: Any) -> Any:
    # Literal compares by ==, and 1 == True.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError("Input should be true, false or 'never'")
    return value


EarlyStopping = Annotated[Literal[True, False, "never"], BeforeValidator(_no_number)]
TokenId = Annotated[int, Field(ge=0)]  # below the vocabulary's size: the checkpoint's business
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_SUPPRESSED_TOKENS, fail_fast=True)]
BadWord = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_BAD_WORD_TOKENS, fail_fast=True)]
BadWords = Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)]


class Body(BaseModel):
    """Strict: no unknown key, no type conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


class GenerateParameters(Body):
    """How summaries are decoded; names and meanings are those of transformers' `generate`.

    What is not given comes from the checkpoint's `generation_config.json`. A length given here replaces both forms of
    the same bound there, and where the checkpoint's own numbers do not fit the `num_beams`, `num_beam_groups` or
    `do_sample` given here, they give way. An option without effect, such as `temperature` without `do_sample`, is
    accepted.
    """

    num_beams: Annotated[
        int | None, Field(ge=1, description="Beams; 1 is greedy decoding, or plain sampling with do_sample.")
    ] = None
    num_return_sequences: Annotated[
        int | None, Field(ge=1, description="At most num_beams; with do_sample and one beam, so many samples.")
    ] = None
    max_length: Annotated[int | None, Field(ge=2, description="max_new_tokens + 1: counts the start token.")] = None
    max_new_tokens: Annotated[int | None, Field(ge=1, description="Most tokens, end token included.")] = None
    min_length: Annotated[int | None, Field(ge=0, description="min_new_tokens + 1: counts the start token.")] = None
    min_new_tokens: Annotated[int | None, Field(ge=0, description="No end token before this many tokens.")] = None
    length_penalty: Annotated[
        float | None,
        Field(ge=-2, le=10, description="A hypothesis scores sum_log_probs / tokens ** length_penalty."),
    ] = None
    early_stopping: Annotated[EarlyStopping | None, Field(description="When beam search stops.")] = None
    no_repeat_ngram_size: Annotated[
        int | None, Field(ge=0, le=1000, description="No n-gram of this size twice; 0 is off.")
    ] = None
    encoder_no_repeat_ngram_size: Annotated[
        int | None, Field(ge=0, le=1000, description="No n-gram of this size copied from the text; 0 is off.")
    ] = None
    repetition_penalty: Annotated[
        float | None, Field(ge=0.01, le=100, description="Above 1: says less twice; 1 is off.")
    ] = None
    bad_words_ids: Annotated[BadWords | None, Field(description="Token sequences that are never completed.")] = None
    suppress_tokens: Annotated[TokenIds | None, Field(description="Tokens that are never said.")] = None
    begin_suppress_tokens: Annotated[
        TokenIds | None, Field(description="Tokens that are not said first (second, behind forced_bos_token_id).")
    ] = None
    forced_bos_token_id: Annotated[TokenId | None, Field(description="The first token, whatever the scores.")] = None
    forced_eos_token_id: Annotated[
        TokenId | None, Field(description="The token at the length limit, whatever the scores.")
    ] = None
    do_sample: Annotated[
        bool | None,
        Field(
            description="Draw tokens instead of taking the best. num_beams stays the checkpoint's unless given: with "
            "1, independent samples; above, beam search over drawn candidates."
        ),
    ] = None
    temperature: Annotated[
        float | None, Field(ge=0.01, le=100, description="Scores are divided by it before drawing; below 1 is sharper.")
    ] = None
    top_k: Annotated[
        int | None, Field(ge=0, le=2**31 - 1, description="Draw from the k best tokens; 0 is off. Default: 50.")
    ] = None
    top_p: Annotated[
        float | None,
        Field(gt=0, le=1, description="Draw from the fewest tokens that hold this much probability; 1 is off."),
    ] = None
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            le=2**63 - 1,
            description="The same seed draws the same tokens for the same text, whatever else is decoded beside it. "
            "Default: another one for each text.",
        ),
    ] = None
    num_beam_groups: Annotated[
        int | None,
        Field(ge=1, description="Diverse beam search in so many groups; divides num_beams. 1 is plain beam search."),
    ] = None
    diversity_penalty: Annotated[
        float | None,
        Field(ge=0, le=100, description="Taken from a token's score for each beam of an earlier group that says it."),
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
        Field(
            alias="return",
            description="`tokens` adds token_ids and token_logprobs; `alternatives` adds every returned hypothesis.",
        ),
    ] = None


_ONE_SPELLING: dict[str, Any] = {
    "oneOf": [{"required": [name], "properties": {name: {"type": ["string", "array"]}}} for name in ("inputs", "text")]
}


class SummarizeRequest(Body):
    """The request of Hugging Face's summarisation task."""

    model_config = ConfigDict(json_schema_extra=_ONE_SPELLING)

    inputs: Annotated[Inputs | None, Field(description="One text or several.")] = None
    text: Annotated[Inputs | None, Field(description="Old name of `inputs`; give one of them.")] = None
    parameters: Parameters | None = None
    stream: Annotated[
        bool | None,
        Field(description="Send each summary as it becomes certain, as server-sent events; so does Accept."),
    ] = None


class TokenizeRequest(Body):
    """Texts to hold against the token limit."""

    model_config = ConfigDict(json_schema_extra=_ONE_SPELLING)

    inputs: Annotated[AnyInputs | None, Field(description="One text or several.")] = None
    text: Annotated[AnyInputs | None, Field(description="Old name of `inputs`; give one of them.")] = None


class Alternative(BaseModel):
    """One hypothesis."""

    summary_text: str
    score: Annotated[
        float,
        Field(
            description="Beams: sum of log-probabilities / tokens ** length_penalty. Greedy and sampling: mean "
            "log-probability."
        ),
    ]
    finish_reason: Annotated[Literal["eos", "length"], Field(description="Ended by the model, or by the length limit.")]
    output_tokens: Annotated[int, Field(description="Tokens of the summary, end token included.")]
    token_ids: Annotated[
        list[int] | None, Field(description="On request: ids after the start token, end token included.")
    ] = None
    token_logprobs: Annotated[
        list[float] | None,
        Field(description="On request: the log-probability of each of token_ids, after every option that changes it."),
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
