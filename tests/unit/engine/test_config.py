"""What options mean, and that none is ignored in silence."""

from __future__ import annotations

from typing import Any

import pytest

from app.engine import GenerationParams


def test_lengths_of_transformers_count_the_start_token() -> None:
    params = GenerationParams.from_generation_config({"max_length": 128, "min_length": 8})
    assert (params.max_new_tokens, params.min_new_tokens) == (127, 7)


def test_new_tokens_win_over_lengths() -> None:
    settings = {"max_length": 128, "max_new_tokens": 10, "min_length": 0, "min_new_tokens": 3}
    params = GenerationParams.from_generation_config(settings)
    assert (params.max_new_tokens, params.min_new_tokens) == (10, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("do_sample", True), ("num_beam_groups", 2), ("suppress_tokens", [5]), ("encoder_no_repeat_ngram_size", 3)],
)
def test_an_option_that_is_not_built_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        GenerationParams.from_generation_config({name: value})


def test_an_option_that_asks_for_nothing_is_not() -> None:
    settings = {"do_sample": False, "num_beam_groups": 1, "suppress_tokens": None, "transformers_version": "5.23.0"}
    assert GenerationParams.from_generation_config(settings).num_beams == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1; it is 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, more than num_beams, which is 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0; it is 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be greater than 0"),
        ({"early_stopping": "always"}, "early_stopping must be true, false or 'never'; it is 'always'"),
        ({"min_new_tokens": -1}, "min_new_tokens must not be negative; it is -1"),
    ],
)
def test_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationParams(**options)
