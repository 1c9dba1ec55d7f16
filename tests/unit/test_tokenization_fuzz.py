"""The token limit for any text at all, with the shipped checkpoint's own tokenizer as the oracle.

The oracle is a fresh instance of the library on the same file, asked for the whole encoding of one text.
"""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from tokenizers import Encoding
from tokenizers import Tokenizer as BackendTokenizer

from app.errors import InputTooLong, InvalidRequest
from app.tokenization import Tokenizer
from tests.shipped import shipped_folder

LIMIT = 512
FOLDER = shipped_folder()
assert FOLDER is not None, "model_store/ holds no checkpoint, and the repository ships one"
TOKENIZER = Tokenizer.from_folder(FOLDER, LIMIT)
SHORT_TOKENIZER = Tokenizer.from_folder(FOLDER, 8)  # nearly every text has its cut somewhere odd
ORACLE = BackendTokenizer.from_file(str(FOLDER / "tokenizer.json"))

# Scripts and oddities whose normalisation removes, splits, widens or reorders characters.
PIECES = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Mn", "Mc", "Me", "Cf", "Cc", "Zs"]), max_size=12),
    st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), max_size=12),  # Hangul: up to three tokens each
    st.text(st.characters(min_codepoint=0x1100, max_codepoint=0x11FF), max_size=12),  # and in pieces
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=12),
    st.text(st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF), max_size=12),
    st.text(st.sampled_from("aeiou\u0301\u0327\u0323\u302e\U0001d165\u09cb\u0bcbñÅİß"), max_size=12),
    st.builds(lambda letter, n: letter * n, st.sampled_from(["a", "z", "é", "한", "ೋ"]), st.integers(95, 105)),
    st.sampled_from(
        ["\0", "\ufffd", "\u200d", "👩‍👩‍👧", "[SEP]", "[CLS]", "[PAD]", "[SE", "##ing", "unaffable", "\r\n"]
    ),
)
SHORT = st.lists(PIECES, max_size=12).map("".join)
# One character that the vocabulary lacks makes its whole word one token; spaces keep words apart.
WORDS = st.lists(PIECES, min_size=4, max_size=12).map(" ".join)
UNEVEN = st.text(
    st.sampled_from("한국가a漢é\u0301\u09cb \0"), min_size=4, max_size=12
)  # no, one, two or three tokens each


@st.composite
def long_texts(draw: st.DrawFn) -> str:
    """Over the limit, or within a few tokens of it; anything at the beginning, at the cut and at the end."""
    head, middle, tail = draw(SHORT), draw(SHORT), draw(SHORT)
    filler = draw(st.sampled_from(["word ", "unaffableness ", "한 ", "한국말 ", "漢", "e\u0301 ", "🙂 ", "it's "]))
    cost = len(oracle(filler * 8).ids) / 8
    before = int((draw(st.integers(LIMIT - 30, LIMIT)) - len(oracle(head).ids)) / cost)
    text = head + filler * before + middle
    over = draw(st.sampled_from([LIMIT + 60, LIMIT - 2, LIMIT - 1]))
    return text + " " + filler * int((over - len(oracle(text).ids)) / cost) + tail


OVER_THE_LIMIT = long_texts().filter(lambda text: len(oracle(text).ids) > LIMIT - 2)


def oracle(text: str) -> Encoding:
    """The library's own encoding, without special tokens."""
    return ORACLE.encode(text, add_special_tokens=False)


def overlaps(encoding: Encoding, index: int) -> bool:
    """Whether token `index` and the one before it come from one character: no prefix ends between them."""
    offsets: list[tuple[int, int]] = encoding.offsets
    return offsets[index][0] < offsets[index - 1][1]


@settings(deadline=None, max_examples=250)
@given(st.one_of(SHORT, long_texts()))
def test_the_count_is_the_librarys_and_decides(text: str) -> None:
    expected = ORACLE.encode(text)
    event(f"over the limit: {len(expected.ids) > LIMIT}")
    (count,) = TOKENIZER.count([text])
    assert (count.tokens, count.limit) == (len(expected.ids), LIMIT)
    assert count.excess == max(0, len(expected.ids) - LIMIT)
    assert (count.cut_at_char is None) == (count.excess == 0)
    assume(len(expected.ids) > 2)
    if count.excess:
        with pytest.raises(InputTooLong) as caught:
            TOKENIZER.encode(["fits", text])
        (error,) = caught.value.errors
        assert (error["index"], error["tokens"], error["excess"]) == (1, count.tokens, count.excess)
        assert error["cut_at_char"] == count.cut_at_char
    else:
        assert TOKENIZER.encode([text])[0].ids == tuple(expected.ids)


def is_reordered(text: str) -> bool:
    """Whether NFD, which BERT normalises to, changes the order of marks. The library's offsets are wrong then.

    The prefix up to the cut fits all the same, but it need not be the longest, nor encode to the text's own tokens.
    """
    return unicodedata.normalize("NFD", text) != "".join(unicodedata.normalize("NFD", c) for c in text)


def check_cut(tokenizer: Tokenizer, text: str) -> None:
    """The prefix up to `cut_at_char` is accepted, one that ends after the next token is not."""
    cut = tokenizer.count([text])[0].cut_at_char
    assert cut is not None
    whole = oracle(text)
    assert len(ORACLE.encode(text[:cut]).ids) <= tokenizer.limit
    event(f"reordered: {is_reordered(text)}")
    if is_reordered(text):
        return
    following = min(end for _, end in whole.offsets if end > cut)
    assert len(ORACLE.encode(text[:following]).ids) > tokenizer.limit
    # It is the end of the last token that fits, unless that token shares its character with the next one.
    room = tokenizer.limit - 2
    event(f"cut within a character: {overlaps(whole, room)}")
    if not overlaps(whole, room):
        assert cut == whole.offsets[room - 1][1]


@settings(deadline=None, max_examples=150)
@example("한국 " * 100)
@example("word " * 509 + "한국")
@example("word " * 509 + "\u09cb" * 3 + " word word")
@given(OVER_THE_LIMIT)
def test_the_prefix_up_to_the_cut_is_accepted_and_one_token_more_is_not(text: str) -> None:
    check_cut(TOKENIZER, text)


@settings(deadline=None, max_examples=700)
@example("0 0 0: 0: \u0323\U0001d16e")
@example("0 0 0 0: \u09cb\u0300\U0001d165 0")
@example("0 0 0 0: \u09cb\U0001d165\u0300 0")
@given(st.one_of(WORDS, UNEVEN).filter(lambda text: len(oracle(text).ids) > 6))
def test_cuts_are_as_exact_in_the_middle_of_anything(text: str) -> None:
    check_cut(SHORT_TOKENIZER, text)


@settings(deadline=None, max_examples=150)
@example("한국 " * 100)
@example("word " * 509 + "한국")
@given(OVER_THE_LIMIT)
def test_a_cut_tail_is_the_encoding_of_the_prefix(text: str) -> None:
    (count,) = TOKENIZER.count([text])
    whole = oracle(text)
    tail = TOKENIZER.encode([text], "truncate_tail")[0]
    assert tail.truncated
    assert tail.source_tokens == count.tokens
    assert tail.ids[1:-1] == tuple(whole.ids[: LIMIT - 2])
    prefix = ORACLE.encode(text[: count.cut_at_char]).ids
    if is_reordered(text):
        assert len(prefix) <= LIMIT
    elif not overlaps(whole, LIMIT - 2):
        assert tail.ids == tuple(prefix)
    else:  # the prefix leaves the whole character out, the cut keeps the tokens of it that fit
        assert LIMIT - 4 <= len(prefix) < LIMIT
        assert tail.ids[: len(prefix) - 1] == tuple(prefix[:-1])


@settings(deadline=None, max_examples=150)
@example(":\u302e\u0316" + "word " * 509)
@given(OVER_THE_LIMIT)
def test_a_cut_head_is_the_encoding_of_the_suffix(text: str) -> None:
    whole = oracle(text)
    head = TOKENIZER.encode([text], "truncate_head")[0]
    assert head.source_tokens == len(whole.ids) + 2
    first = len(whole.ids) - (LIMIT - 2)
    assert head.ids[1:-1] == tuple(whole.ids[first:])
    assert (head.ids[0], head.ids[-1]) == tuple(ORACLE.encode("").ids)
    # A suffix that begins within a word is another word; only at a word's beginning is it the same text, and only where
    # the library's offsets say where that is.
    if is_reordered(text):
        return
    if not whole.tokens[first].startswith("##") and not overlaps(whole, first):
        assert head.ids == tuple(ORACLE.encode(text[whole.offsets[first][0] :]).ids)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(SHORT, long_texts()), min_size=2, max_size=5))
def test_company_does_not_change_a_count(texts: list[str]) -> None:
    assert TOKENIZER.count(texts) == [TOKENIZER.count([text])[0] for text in texts]


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(categories=["Cs", "L", "N"]), min_size=1))
def test_lone_surrogates_and_only_they_are_refused(text: str) -> None:
    lone = any("\ud800" <= character <= "\udfff" for character in text)
    if not lone:
        TOKENIZER.count([text])
        return
    for call in (TOKENIZER.count, TOKENIZER.encode):
        with pytest.raises(InvalidRequest, match="surrogate"):
            call(["fits", text])


@pytest.mark.parametrize("word", ["word", "漢", "🙂", "!", "[SEP]", "z" * 150])
def test_512_are_accepted_and_513_are_not(word: str) -> None:
    fits, too_long = " ".join([word] * (LIMIT - 2)), " ".join([word] * (LIMIT - 1))
    assert len(TOKENIZER.encode([fits])[0].ids) == LIMIT
    with pytest.raises(InputTooLong, match="is 513 tokens; the limit is 512") as caught:
        TOKENIZER.encode([too_long])
    assert caught.value.errors[0]["cut_at_char"] == len(fits)
