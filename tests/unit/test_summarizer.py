"""Options of a request over those of the checkpoint, and admission."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.engine import GenerationParams
from app.errors import InvalidRequest
from app.schemas import Parameters
from app.summarizer import RequestLimits, default_params, generation_params, overflow_policy

LIMITS = RequestLimits(max_batch_size=32, max_num_beams=8, max_output_tokens=100, vocab_size=60)
DEFAULTS = GenerationParams(num_beams=4, max_new_tokens=50, min_new_tokens=10, length_penalty=2.0)
DIVERSE = GenerationParams(num_beams=8, num_return_sequences=8, num_beam_groups=4, diversity_penalty=0.5)
SAMPLING = GenerationParams(num_return_sequences=6, do_sample=True, temperature=0.7)


def resolve(defaults: GenerationParams = DEFAULTS, /, **values: Any) -> GenerationParams:
    return generation_params(Parameters.model_validate(values), defaults, LIMITS)


def test_the_checkpoint_fills_what_is_not_given() -> None:
    assert resolve() == DEFAULTS
    assert resolve(generate_parameters={"num_beams": 2}).length_penalty == 2.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_length": 31}, (30, 10)),
        ({"max_new_tokens": 30}, (30, 10)),
        ({"max_length": 31, "max_new_tokens": 30}, (30, 10)),
        ({"min_length": 0}, (50, 0)),
        ({"min_length": 21}, (50, 20)),
        ({"min_new_tokens": 0}, (50, 0)),
        ({"max_new_tokens": 4}, (4, 4)),  # the checkpoint's minimum gives way
    ],
)
def test_lengths(values: dict[str, int], expected: tuple[int, int]) -> None:
    for params in (resolve(**values), resolve(generate_parameters=values)):
        assert (params.max_new_tokens, params.min_new_tokens) == expected


@pytest.mark.parametrize(
    ("values", "pointer", "message"),
    [
        ({"num_beams": 9}, "/parameters/num_beams", "num_beams is 9; the limit is 8"),
        ({"generate_parameters": {"max_length": 102}}, "/parameters/generate_parameters/max_length", "limit is 100"),
        ({"max_new_tokens": 101}, "/parameters/max_new_tokens", "is 101; the limit is 100"),
        ({"max_new_tokens": 9, "max_length": 9}, "/parameters/max_new_tokens", "give one of them"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "/parameters/min_new_tokens", "more than max_new_tokens"),
        ({"num_return_sequences": 5}, "/parameters/num_return_sequences", "more than num_beams, which is 4"),
        ({"num_beams": 2, "generate_parameters": {"num_beams": 3}}, "/parameters/num_beams", "given twice"),
        (
            {"suppress_tokens": [3], "generate_parameters": {"suppress_tokens": [4]}},
            "/parameters/suppress_tokens",
            "given twice",
        ),
        ({"num_beams": 1, "num_return_sequences": 2}, "/parameters/num_return_sequences", "more than num_beams"),
        (
            {"num_beams": 2, "num_return_sequences": 3, "do_sample": True},
            "/parameters/num_return_sequences",
            "more than num_beams, which is 2",
        ),
        (
            {"num_beams": 1, "num_return_sequences": 9, "do_sample": True},
            "/parameters/num_return_sequences",
            "num_return_sequences is 9; the limit is 8",
        ),
        ({"num_beam_groups": 3}, "/parameters/num_beam_groups", "is 3; it must divide num_beams, which is 4"),
        ({"num_beam_groups": 8}, "/parameters/num_beam_groups", "it must divide num_beams, which is 4"),
        ({"diversity_penalty": 0.5}, "/parameters/diversity_penalty", "is 0.5, but num_beam_groups is 1"),
        ({"num_beam_groups": 2, "do_sample": True}, "/parameters/num_beam_groups", "with do_sample it must be 1"),
        (
            {"forced_bos_token_id": 60},
            "/parameters/forced_bos_token_id",
            "forced_bos_token_id has token id 60; .* is 59",
        ),
        (
            {"generate_parameters": {"bad_words_ids": [[59], [1, 2, 60]]}},
            "/parameters/generate_parameters/bad_words_ids/1/2",
            "bad_words_ids has token id 60; the largest is 59",
        ),
    ],
)
def test_refusals_name_the_option_and_the_limit(values: dict[str, Any], pointer: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        resolve(**values)
    assert caught.value.errors[0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("defaults", "values", "expected"),
    [
        (DIVERSE, {}, (8, 4, 0.5, 8, False)),
        (DIVERSE, {"num_beams": 4}, (4, 4, 0.5, 4, False)),
        (DIVERSE, {"num_beams": 6}, (6, 2, 0.5, 6, False)),
        (DIVERSE, {"num_beams": 3}, (3, 1, 0.0, 3, False)),
        (DIVERSE, {"num_beam_groups": 1}, (8, 1, 0.0, 8, False)),
        (DIVERSE, {"num_beam_groups": 2, "diversity_penalty": 1}, (8, 2, 1.0, 8, False)),
        (DIVERSE, {"do_sample": True}, (8, 1, 0.0, 8, True)),
        (SAMPLING, {}, (1, 1, 0.0, 6, True)),
        (SAMPLING, {"num_return_sequences": 8}, (1, 1, 0.0, 8, True)),
        (SAMPLING, {"num_beams": 2}, (2, 1, 0.0, 2, True)),
        (SAMPLING, {"do_sample": False}, (1, 1, 0.0, 1, False)),
        (SAMPLING, {"num_beams": 4, "num_beam_groups": 2}, (4, 2, 0.0, 4, False)),
        (DEFAULTS, {"do_sample": True}, (4, 1, 0.0, 1, True)),
        (DEFAULTS, {"temperature": 0.5, "top_k": 3}, (4, 1, 0.0, 1, False)),
    ],
)
def test_what_of_the_checkpoint_does_not_fit_gives_way(
    defaults: GenerationParams, values: dict[str, Any], expected: tuple[int, int, float, int, bool]
) -> None:
    found = resolve(defaults, **values)
    assert expected == (
        found.num_beams,
        found.num_beam_groups,
        found.diversity_penalty,
        found.num_return_sequences,
        found.do_sample,
    )


def test_lists_of_tokens_replace_the_checkpoints() -> None:
    defaults = GenerationParams(suppress_tokens=(1, 2), bad_words_ids=((3,),), seed=None)
    found = resolve(defaults, suppress_tokens=[], begin_suppress_tokens=[59], seed=0)
    assert (found.suppress_tokens, found.begin_suppress_tokens, found.bad_words_ids) == ((), (59,), ((3,),))
    assert found.seed == 0
    assert resolve(defaults, bad_words_ids=[[4, 5]]).bad_words_ids == ((4, 5),)


def test_no_token_is_both_forced_and_suppressed() -> None:
    forcing, suppressing = GenerationParams(forced_eos_token_id=7), GenerationParams(suppress_tokens=(7, 8))
    found = resolve(forcing, suppress_tokens=[7])
    assert (found.suppress_tokens, found.forced_eos_token_id) == ((7,), None)
    found = resolve(suppressing, forced_bos_token_id=7)
    assert (found.suppress_tokens, found.forced_bos_token_id) == ((8,), 7)
    with pytest.raises(InvalidRequest, match="forced_bos_token_id is 7, which suppress_tokens forbids") as caught:
        resolve(GenerationParams(), forced_bos_token_id=7, suppress_tokens=[7])
    assert caught.value.errors[0]["pointer"] == "/parameters/forced_bos_token_id"


@pytest.mark.parametrize(
    ("values", "policy"),
    [
        ({}, "error"),
        ({"truncation": "do_not_truncate"}, "error"),
        ({"truncation": "only_second"}, "error"),
        ({"truncation": "only_first"}, "truncate_tail"),
        ({"truncation": "longest_first", "overflow": "truncate_tail"}, "truncate_tail"),
        ({"overflow": "truncate_head"}, "truncate_head"),
        ({"truncation": "only_first", "overflow": "error"}, None),
        ({"truncation": "do_not_truncate", "overflow": "truncate_head"}, None),
        ({"overflow": "chunk"}, None),
    ],
)
def test_overflow(values: dict[str, Any], policy: str | None) -> None:
    parameters = Parameters.model_validate(values)
    if policy is None:
        with pytest.raises(InvalidRequest, match="overflow"):
            overflow_policy(parameters, "error")
    else:
        assert overflow_policy(parameters, "error") == policy


def test_the_operators_limits_bound_the_checkpoints_options() -> None:
    params = default_params({"num_beams": 20, "num_return_sequences": 10, "max_length": 300, "min_length": 200}, LIMITS)
    assert (params.num_beams, params.num_return_sequences) == (8, 8)
    assert (params.max_new_tokens, params.min_new_tokens) == (100, 100)
    params = default_params({"num_beams": 20, "num_beam_groups": 10, "diversity_penalty": 0.5}, LIMITS)
    assert (params.num_beams, params.num_beam_groups) == (8, 2)
    assert default_params({"do_sample": True, "num_return_sequences": 20}, LIMITS).num_return_sequences == 8


def test_a_checkpoint_with_tokens_beyond_its_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="token id 60 is not below the vocabulary's size, 60"):
        default_params({"bad_words_ids": [[1, 60]]}, LIMITS)


def test_the_sources_ngrams_cannot_be_blocked_in_another_vocabulary() -> None:
    two = replace(LIMITS, one_vocabulary=False)
    asked = Parameters.model_validate({"generate_parameters": {"encoder_no_repeat_ngram_size": 3}})
    assert generation_params(asked, DEFAULTS, LIMITS).encoder_no_repeat_ngram_size == 3
    with pytest.raises(InvalidRequest, match="is 3; with this model it must be 0") as caught:
        generation_params(asked, DEFAULTS, two)
    assert caught.value.errors[0]["pointer"] == "/parameters/generate_parameters/encoder_no_repeat_ngram_size"
    off = Parameters.model_validate({"encoder_no_repeat_ngram_size": 0})
    assert generation_params(off, DEFAULTS, two).encoder_no_repeat_ngram_size == 0
    with pytest.raises(ValueError, match="must be 0"):
        default_params({"max_length": 20, "encoder_no_repeat_ngram_size": 2}, two)
