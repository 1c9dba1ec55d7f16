"""Options of a request over those of the checkpoint, and admission."""

from __future__ import annotations

from typing import Any

import pytest

from app.engine import GenerationParams
from app.errors import BatchTooLarge, InvalidRequest, QueueFull
from app.schemas import Parameters
from app.summarizer import Admission, RequestLimits, default_params, generation_params, overflow_policy

LIMITS = RequestLimits(max_batch_size=32, max_num_beams=8, max_output_tokens=100)
DEFAULTS = GenerationParams(num_beams=4, max_new_tokens=50, min_new_tokens=10, length_penalty=2.0)


def resolve(**values: Any) -> GenerationParams:
    return generation_params(Parameters.model_validate(values), DEFAULTS, LIMITS)


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
    ],
)
def test_refusals_name_the_option_and_the_limit(values: dict[str, Any], pointer: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        resolve(**values)
    assert caught.value.errors[0]["pointer"] == pointer


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


def test_admission_bounds_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("app.summarizer.time.monotonic", lambda: now)
    admission = Admission(100)
    with pytest.raises(BatchTooLarge):
        admission.admit(101)
    admission.admit(60)
    now += 4.0
    with pytest.raises(QueueFull) as caught:
        admission.admit(50)
    assert caught.value.retry_after == 4  # nothing finished in 4 s
    admission.finish(20, served=True)
    admission.admit(50)
    with pytest.raises(QueueFull) as caught:
        admission.admit(60)
    assert caught.value.retry_after == 10  # 50 tokens must leave, at 20 in 4 s
    admission.finish(90, served=False)
    assert admission.tokens == 0
