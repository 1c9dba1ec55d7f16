"""What options mean, and that none is ignored in silence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from transformers import GenerationConfig

from app.engine import GenerationParams
from app.engine.generation_config import NOT_BUILT

# Of transformers: caches, compilation, outputs beside the tokens, other models that draft tokens, and special tokens,
# which `checkpoint.py` reads.
CHANGES_NOTHING = {
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "eos_token_id",
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
    "use_mtp",
}


def test_lengths_of_transformers_count_the_start_token() -> None:
    params = GenerationParams.from_generation_config({"max_length": 128, "min_length": 8})
    assert (params.max_new_tokens, params.min_new_tokens) == (127, 7)


def test_new_tokens_win_over_lengths() -> None:
    settings = {"max_length": 128, "max_new_tokens": 10, "min_length": 0, "min_new_tokens": 3}
    params = GenerationParams.from_generation_config(settings)
    assert (params.max_new_tokens, params.min_new_tokens) == (10, 3)


def test_new_tokens_win_over_a_length_that_would_ask_for_more() -> None:
    params = GenerationParams.from_generation_config({"min_length": 31, "min_new_tokens": 3, "max_new_tokens": 40})
    assert params.min_new_tokens == 3


def test_without_a_length_twenty_tokens_are_written_as_in_transformers() -> None:
    assert GenerationParams.from_generation_config({}).max_new_tokens == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.1),
        ("typical_p", 0.9),
        ("sequence_bias", {"5": 1.0}),
        ("encoder_repetition_penalty", 2.0),
        ("stop_strings", ["."]),
        ("force_words_ids", [[7]]),
        ("max_time", 0.5),
        ("dola_layers", "low"),
        ("remove_invalid_values", True),
    ],
)
def test_an_option_that_is_not_built_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        GenerationParams.from_generation_config({name: value})


def test_every_option_of_transformers_is_known() -> None:
    """A new one is built, refused, or found to change nothing that is said."""
    read = {field.name for field in fields(GenerationParams)} | {"max_length", "min_length"}
    assert set(GenerationConfig().to_dict()) - read - set(NOT_BUILT) - CHANGES_NOTHING == set()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("max_length", "20", "a whole number"),
        ("max_length", 20.0, "a whole number"),
        ("num_beams", True, "a whole number"),
        ("length_penalty", "1.0", "a number"),
        ("length_penalty", 10**400, "a number of fp64"),
        ("do_sample", 1, "true or false"),
        ("early_stopping", 1, "true, false or 'never'"),
        ("suppress_tokens", 5, "a list of token ids"),
        ("suppress_tokens", ["5"], "a list of token ids"),
        ("bad_words_ids", [5, 6], "a list of lists of token ids"),
        ("forced_eos_token_id", "2", "a token id"),
    ],
)
def test_another_type_is_named(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {wanted}; it is {value!r}".replace("[", r"\[")):
        GenerationParams.from_generation_config({name: value})


def test_sampling_without_top_k_draws_from_fifty_as_in_transformers() -> None:
    assert GenerationParams.from_generation_config({"do_sample": True}).top_k == 50


def test_samples_take_rows_and_groups_share_the_beams() -> None:
    assert GenerationParams(do_sample=True, num_return_sequences=3).rows == 3
    assert GenerationParams(num_beams=6, num_beam_groups=3, diversity_penalty=1.0).rows == 6


def test_an_option_that_asks_for_nothing_is_not() -> None:
    settings = {"do_sample": False, "num_beam_groups": 1, "suppress_tokens": None, "transformers_version": "5.23.0"}
    assert GenerationParams.from_generation_config(settings).num_beams == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1; it is 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, more than num_beams, which is 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0 and finite; it is 0.0"),
        ({"temperature": 0.0}, "temperature must be greater than 0 and finite; it is 0.0"),
        ({"top_p": 1.5}, "top_p must be greater than 0 and at most 1; it is 1.5"),
        ({"length_penalty": 11.0}, "length_penalty must be from -10 to 10; it is 11.0"),
        ({"length_penalty": float("nan")}, "length_penalty must be from -10 to 10; it is nan"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups is 3; it must divide num_beams, 4"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "diversity_penalty is 1.0, but num_beam_groups is 1"),
        ({"num_beams": 4, "num_beam_groups": 2, "do_sample": True}, "do not go together"),
        ({"suppress_tokens": (1,) * 257}, "suppress_tokens has 257 tokens; the limit is 256"),
        ({"bad_words_ids": ((1,) * 9,)}, "bad_words_ids has 9 tokens in a word; the limit is 8"),
        ({"bad_words_ids": ((),)}, "a word without tokens"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be greater than 0"),
        ({"early_stopping": "always"}, "early_stopping must be true, false or 'never'; it is 'always'"),
        ({"forced_eos_token_id": 7, "suppress_tokens": (6, 7)}, "forced_eos_token_id is 7, which suppress_tokens forb"),
        ({"min_new_tokens": -1}, "min_new_tokens must be at least 0; it is -1"),
    ],
)
def test_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationParams(**options)
