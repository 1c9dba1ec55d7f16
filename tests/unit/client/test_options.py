"""Options are those of the server's schema, and land where it has them."""

from __future__ import annotations

from typing import get_args

from app import engine
from app.client.options import Options, Priority, parameters
from app.schemas import GenerateParameters, Parameters

OWN = {"truncation", "overflow", "clean_up_tokenization_spaces"}
RETURNED = {"with_tokens", "with_alternatives"}


def test_every_option_of_the_server_is_there_and_no_other() -> None:
    assert set(Options.__annotations__) == set(GenerateParameters.model_fields) | OWN | RETURNED
    assert set(GenerateParameters.model_fields) | OWN | {"generate_parameters", "return_"} == set(
        Parameters.model_fields
    )


def test_priorities_are_the_servers() -> None:
    assert {name.upper() for name in get_args(Priority)} == set(engine.Priority.__members__)


def test_the_server_reads_what_is_sent() -> None:
    sent = parameters(
        Options(num_beams=4, length_penalty=0.8, overflow="truncate_tail", with_tokens=True, with_alternatives=True)
    )
    read = Parameters.model_validate(sent)
    assert read.generate_parameters == GenerateParameters(num_beams=4, length_penalty=0.8)
    assert read.overflow == "truncate_tail"
    assert read.return_ == ["tokens", "alternatives"]


def test_nothing_given_is_nothing_sent() -> None:
    assert parameters({}) == {}
    assert parameters({"with_tokens": False}) == {}


def test_an_option_that_is_not_known_here_is_left_to_the_server() -> None:
    assert parameters({"penalty_alpha": 0.6}) == {"generate_parameters": {"penalty_alpha": 0.6}}
