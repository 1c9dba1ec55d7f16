"""Splitting loses nothing, keeps the order and stays within the limits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.client.batches import body, encode, split
from app.client.models import Limits
from app.tokenization import Tokenizer
from tests.service import backend_tokenizer

PARAMETERS = {"generate_parameters": {"num_beams": 4}}
LIMITS = st.builds(
    Limits,
    max_input_tokens=st.integers(2, 20),
    max_batch_size=st.integers(1, 6),
    max_body_bytes=st.integers(1, 200),
    max_queue_tokens=st.integers(1, 60),
)
ANY_TEXT = st.text(st.characters(codec=None))  # lone surrogates included


@given(st.lists(ANY_TEXT), LIMITS)
def test_every_text_is_in_one_batch_in_order_and_within_the_limits(texts: list[str], limits: Limits) -> None:
    batches = list(split(encode(texts), limits, len(body([], PARAMETERS))))
    assert [text.index for batch in batches for text in batch] == list(range(len(texts)))
    for batch in batches:
        content = body(batch, PARAMETERS)
        assert json.loads(content) == {"inputs": [texts[text.index] for text in batch], "parameters": PARAMETERS}
        if len(batch) > 1:
            assert len(batch) <= limits.max_batch_size
            assert len(content) <= limits.max_body_bytes
            assert sum(min(limits.max_input_tokens, len(t.json)) for t in batch) <= limits.max_queue_tokens


def test_a_batch_is_as_large_as_the_limits_allow() -> None:
    limits = Limits(max_input_tokens=10, max_batch_size=32, max_body_bytes=1000, max_queue_tokens=1000)
    sizes = [len(batch) for batch in split(encode(["a text"] * 100), limits, 20)]
    assert sizes == [32, 32, 32, 4]


@given(ANY_TEXT, ANY_TEXT)
def test_bytes_are_counted_exactly(first: str, second: str) -> None:
    texts = encode([first, second])
    size = len(body(texts, PARAMETERS))
    for limit, batches in ((size, 1), (size - 1, 2)):
        limits = Limits(max_input_tokens=9, max_batch_size=9, max_body_bytes=limit, max_queue_tokens=99)
        assert len(list(split(texts, limits, len(body([], PARAMETERS))))) == batches


@given(ANY_TEXT.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)))
def test_a_text_has_no_more_tokens_than_its_json_has_bytes(text: str) -> None:
    counted = Tokenizer(backend_tokenizer(), 12).count([text])[0].tokens
    assert counted <= len(encode([text])[0].json)


def test_no_parameters_are_not_sent() -> None:
    assert json.loads(body(encode(["a"]), {})) == {"inputs": ["a"]}


def test_one_text_is_not_taken_for_a_list_of_letters() -> None:
    with pytest.raises(TypeError, match="give a list of texts"):
        encode("a text")
    with pytest.raises(TypeError, match="a text is bytes, not str"):
        encode([b"a"])  # type: ignore[list-item]


def test_repr_has_no_text() -> None:
    assert "secret" not in repr(encode(["secret"]))
