"""One tokenizer or two: what sources, labels and summaries are made with."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.mixes import make_base
from train.tokenizer_pair import (
    PADDING,
    TokenizerError,
    TokenizerPair,
    first_id,
    label_ids,
    last_id,
    load_summary_tokenizer,
    load_tokenizer,
)

TEXT = "kaban loder miban"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def pair(bert: Path, gpt2: Path) -> TokenizerPair:
    return TokenizerPair(load_tokenizer(str(bert)), load_summary_tokenizer(str(gpt2)))


def test_gpt2_gets_an_end_and_a_padding_token_of_its_own(gpt2: Path) -> None:
    plain, tokenizer = AutoTokenizer.from_pretrained(gpt2), load_summary_tokenizer(str(gpt2))
    assert tokenizer(TEXT)["input_ids"] == [*plain(TEXT)["input_ids"], plain.eos_token_id]
    assert tokenizer.pad_token == PADDING
    assert tokenizer.pad_token_id == len(plain)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert (first_id(tokenizer), last_id(tokenizer)) == (plain.bos_token_id, plain.eos_token_id)


def test_what_was_added_is_there_after_saving(gpt2: Path, tmp_path: Path) -> None:
    tokenizer = load_summary_tokenizer(str(gpt2))
    tokenizer.save_pretrained(tmp_path)
    again = load_summary_tokenizer(str(tmp_path))
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert (again.pad_token_id, len(again)) == (tokenizer.pad_token_id, len(tokenizer))


def test_sources_and_summaries_go_through_their_own(pair: TokenizerPair) -> None:
    assert pair(TEXT)["input_ids"] == pair.source(TEXT)["input_ids"]
    ids = pair(text_target=TEXT)["input_ids"]
    assert ids == pair.target(TEXT)["input_ids"] != pair(TEXT)["input_ids"]
    assert pair.decode(ids, skip_special_tokens=True) == TEXT
    assert pair.batch_decode([ids], skip_special_tokens=True) == [TEXT]
    assert pair.pad_token_id == pair.source.pad_token_id
    assert (first_id(pair), last_id(pair)) == (first_id(pair.target), last_id(pair.target))


def test_a_pair_is_saved_and_read_as_one(pair: TokenizerPair, tmp_path: Path) -> None:
    pair.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert isinstance(again, TokenizerPair)
    assert again(TEXT)["input_ids"] == pair(TEXT)["input_ids"]
    assert again(text_target=TEXT)["input_ids"] == pair(text_target=TEXT)["input_ids"]


def test_a_pair_can_be_copied_and_sent_to_another_process(pair: TokenizerPair) -> None:
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert twin(text_target=TEXT)["input_ids"] == pair(text_target=TEXT)["input_ids"]


def test_labels_have_no_start_token_and_always_their_end(bert: Path, pair: TokenizerPair) -> None:
    one = load_tokenizer(str(bert))
    long = " ".join([TEXT] * 5)
    for tokenizer, target in ((one, one), (pair, pair.target)):
        end = last_id(tokenizer)
        short, cut = label_ids(tokenizer, [TEXT, long], 8)
        assert target.decode(short, skip_special_tokens=True) == TEXT
        assert first_id(tokenizer) not in short[:-1]
        assert short[-1] == cut[-1] == end
        assert len(cut) == 7  # the start token is the eighth


def test_labels_that_do_not_end_are_refused(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    with pytest.raises(TokenizerError, match="does not end with the end token"):
        label_ids(TokenizerPair(tokenizer, without_end(tokenizer)), [TEXT], 8)


def without_end(tokenizer: object) -> object:
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = None  # type: ignore[attr-defined]
    return plain


def test_a_tokenizer_without_padding_cannot_read_sources(gpt2: Path) -> None:
    with pytest.raises(TokenizerError, match="has no padding token"):
        load_tokenizer(str(gpt2))
