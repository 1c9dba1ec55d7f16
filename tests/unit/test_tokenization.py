"""The token limit: exact counts, exact cuts, nothing cut unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from app.errors import InputTooLong, InvalidRequest, ModelCorrupt
from app.tokenization import DECODER_TOKENIZER, Tokenizer, clean_up, label
from tests.service import ALPHABET, LIMIT, backend_tokenizer

TOKENIZER = Tokenizer(backend_tokenizer(), LIMIT)
CLS, SEP = 2, 3
TEXTS = st.text(
    st.sampled_from([*ALPHABET[:30], " ", "\0", "\u0301", "한", "국", "漢", "é", "☃", "É", "\ufffd"]), max_size=40
)


def ids(text: str) -> tuple[int, ...]:
    return TOKENIZER.encode([text])[0].ids


def test_the_limit_itself_fits_and_one_more_does_not() -> None:
    fits, too_long = " ".join("a" * (LIMIT - 2)), " ".join("a" * (LIMIT - 1))
    assert len(ids(fits)) == LIMIT
    with pytest.raises(InputTooLong) as caught:
        TOKENIZER.encode(["a", too_long, "b", too_long])
    assert [error["index"] for error in caught.value.errors] == [1, 3]
    assert caught.value.errors[0] == {
        "index": 1,
        "tokens": LIMIT + 1,
        "limit": LIMIT,
        "excess": 1,
        "cut_at_char": len(fits),
        "pointer": "/inputs/1",
        "message": "inputs[1] is 13 tokens; the limit is 12 (2 of them special tokens): 1 too many.",
    }


def test_truncation_and_padding_of_the_file_do_not_count() -> None:
    assert TOKENIZER.count(["a b c d e f g"])[0].tokens == 9
    assert ids("a") == (CLS, ids("a")[1], SEP)


def test_tail_and_head() -> None:
    text = "a b c d e f g h i j k l m"
    whole = Tokenizer(backend_tokenizer(), 100).encode([text])[0].ids
    tail, head = TOKENIZER.encode([text], "truncate_tail")[0], TOKENIZER.encode([text], "truncate_head")[0]
    assert tail.ids == (*whole[: LIMIT - 1], SEP)
    assert head.ids == (CLS, *whole[-(LIMIT - 1) :])
    assert tail.truncated
    assert tail.source_tokens == head.source_tokens == len(whole) == 15
    assert not TOKENIZER.encode(["a"], "truncate_tail")[0].truncated


@pytest.mark.parametrize("text", ["", " \n", "\0", "\0 \0", "\ufffd"])
def test_nothing_to_summarise(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"inputs\[1\] has nothing"):
        TOKENIZER.encode(["a", text])
    assert TOKENIZER.count([text])[0].tokens == 2


@pytest.mark.parametrize("method", [TOKENIZER.encode, TOKENIZER.count])
def test_lone_surrogates(method: object) -> None:
    assert callable(method)
    with pytest.raises(InvalidRequest, match="surrogate"):
        method(["a \ud800 b"])


def test_nul_is_removed_and_offsets_stay_those_of_the_text() -> None:
    assert ids("h\0ello") == ids("hello")
    text = "\0".join("a " * 20)
    assert TOKENIZER.count([text])[0].cut_at_char == text.index("a", 9 * 4) + 1


def test_a_syllable_of_three_tokens_is_not_cut_in_the_middle() -> None:
    text = "한" * 5  # 15 tokens, of which 10 fit: three syllables
    assert TOKENIZER.count([text])[0].cut_at_char == 3


@settings(deadline=None)
@given(TEXTS)
def test_the_prefix_up_to_the_cut_fits_and_the_next_token_does_not(text: str) -> None:
    count = TOKENIZER.count([text])[0]
    assert (count.excess > 0) == (count.tokens > LIMIT) == (count.cut_at_char is not None)
    if count.cut_at_char is None:
        return
    assert TOKENIZER.count([text[: count.cut_at_char]])[0].excess == 0
    whole = Tokenizer(backend_tokenizer(), 10_000)._encode([text])[0]
    following = next(end for _, end in whole.offsets if end > count.cut_at_char)
    assert TOKENIZER.count([text[:following]])[0].excess > 0


@settings(deadline=None)
@given(TEXTS)
def test_truncated_ids_always_fit_and_are_framed(text: str) -> None:
    for overflow in ("truncate_tail", "truncate_head"):
        try:
            encoded = TOKENIZER.encode([text], overflow)[0]
        except InvalidRequest:
            continue
        assert 3 <= len(encoded.ids) <= LIMIT
        assert (encoded.ids[0], encoded.ids[-1]) == (CLS, SEP)
        assert len(encoded.ids) == min(LIMIT, encoded.source_tokens)


def test_decode_drops_special_tokens_and_spaces_on_request() -> None:
    tokens = ids("hello , world !")
    assert TOKENIZER.decode(tokens) == "hello, world!"
    assert TOKENIZER.decode(tokens, clean_up_spaces=True) == "hello, world!"
    assert TOKENIZER.decode(tokens, clean_up_spaces=False) == "hello , world !"
    assert clean_up("it 's , ok") == "it's, ok"


def byte_level() -> BackendTokenizer:
    """RoBERTa's kind: bytes, a few merges, offsets trimmed of spaces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", *letters, "he", "llo", "hello", "Ġhello", "ĠĠ"]
    merges = [("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo"), ("Ġ", "hello"), ("Ġ", "Ġ")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "ll"]))}
    tokenizer = BackendTokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
    return tokenizer


BYTES = Tokenizer(byte_level(), LIMIT)


@settings(deadline=None)
@given(st.text(st.sampled_from([*"helo ", "\n", "é", "漢", "😀", "\u0301", "\0"]), max_size=30))
def test_bytes_are_cut_between_characters_and_fit(text: str) -> None:
    count = BYTES.count([text])[0]
    assert (count.excess > 0) == (count.tokens > LIMIT) == (count.cut_at_char is not None)
    if count.cut_at_char is not None:
        assert 0 < count.cut_at_char < len(text)
        assert BYTES.count([text[: count.cut_at_char]])[0].excess == 0
        for overflow in ("truncate_tail", "truncate_head"):
            encoded = BYTES.encode([text], overflow)[0] if not text.isspace() else None
            assert encoded is None or (len(encoded.ids), encoded.ids[0], encoded.ids[-1]) == (LIMIT, 0, 2)


def test_an_emoji_of_four_bytes_is_not_cut_in_the_middle() -> None:
    assert BYTES.count(["😀" * 5])[0].cut_at_char == 2  # 20 bytes, of which 10 fit


@pytest.mark.parametrize("text", ["", " ", " \n\t "])
def test_spaces_that_are_tokens_are_nothing_to_summarise(text: str) -> None:
    with pytest.raises(InvalidRequest, match="has nothing"):
        BYTES.encode([text])


def test_summaries_are_written_in_the_decoders_own_vocabulary(tmp_path: Path) -> None:
    backend_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "decoder_tokenizer").mkdir()
    with pytest.raises(ModelCorrupt, match=r"decoder_tokenizer/tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path, LIMIT)
    byte_level().save(str(tmp_path / DECODER_TOKENIZER))
    both = Tokenizer.from_folder(tmp_path, LIMIT)
    assert both.encode(["hello"])[0].ids == ids("hello")
    summary = byte_level().encode("hello hello ,").ids
    for clean_up_spaces, expected in ((None, "hello hello ,"), (False, "hello hello ,"), (True, "hello hello,")):
        assert both.decode(summary, clean_up_spaces) == expected


def test_labels() -> None:
    assert label("/inputs/3") == "inputs[3]"
    assert label("/text") == "text"


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelCorrupt, match="missing"):
        Tokenizer.from_folder(tmp_path, 12)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelCorrupt, match="cannot be read"):
        Tokenizer.from_folder(tmp_path, 12)
    backend_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path, LIMIT).count(["a " * 11])[0].excess == 1
