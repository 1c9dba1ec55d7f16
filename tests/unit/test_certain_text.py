"""Parts that are sent are the summary, whatever the tokens; nothing that was sent is ever taken back."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.certain_text import CLEAN_UP_REACH, CertainText
from app.errors import EngineFailed
from app.tokenization import Tokenizer, clean_up
from tests.shipped import shipped_folder

FOLDER = shipped_folder()
assert FOLDER is not None
TOKENIZER = Tokenizer.from_folder(FOLDER, 512)
# Words, continuations, punctuation and its spellings, special tokens.
TOKENS = st.one_of(
    st.integers(0, 30521),
    st.sampled_from([0, 100, 101, 102, 1005, 1012, 1010, 1056, 1055, 1049, 2310, 2128, 1029, 999, 1050, 2102]),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(TOKENS, max_size=40), st.sampled_from([None, True, False]), st.data())
def test_parts_of_any_tokens_are_the_text(ids: list[int], clean_up_spaces: bool | None, data: st.DataObject) -> None:
    decode = partial(TOKENIZER.decode, clean_up_spaces=clean_up_spaces)
    certain = CertainText(decode, CLEAN_UP_REACH if clean_up_spaces else 0)
    parts, at = [], 0
    while at < len(ids):
        at = data.draw(st.integers(at + 1, len(ids)))
        parts.append(certain.advance(ids[:at]))
    parts.append(certain.finish(decode(ids)))
    assert "".join(parts) == decode(ids)


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet=" .?!,'ntmsvre", max_size=60), st.text(alphabet=" .?!,'ntmsvre", max_size=40))
def test_clean_up_reaches_no_further_back_than_is_said(before: str, after: str) -> None:
    alone, together = clean_up(before), clean_up(before + after)
    certain = alone[: max(0, len(alone) - CLEAN_UP_REACH)]
    assert together.startswith(certain)


def test_half_a_character_is_held_back() -> None:
    said = {1: "caf\ufffd", 2: "café"}
    certain = CertainText(lambda ids: said[len(ids)])
    assert [certain.advance([7]), certain.advance([7, 8]), certain.finish("café!")] == ["caf", "é", "!"]


def test_text_that_was_sent_cannot_change() -> None:
    certain = CertainText(lambda ids: "one")
    certain.advance([1])
    with pytest.raises(EngineFailed, match="not the beginning"):
        certain.finish("two")
