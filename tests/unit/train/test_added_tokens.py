"""Words that become one token: on both sides, in every kind of model, and over the weights of a run without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EncoderDecoderModel

from tests import mixes
from train.added_tokens import rejoin
from train.config import DataConfig, GenerationSettings, ModelConfig
from train.data import Pair, tokenise
from train.tokenizer_pair import TokenizerPair, summary_tokenizer
from train.warm_start import WarmStart, WarmStartError, load_model, load_weights, plain_copy, warm_start

WORDS = ("#kaban1#", "#loder2#")
TEXT = "#kaban1# kafin #loder2# lohom #kaban1#."
KINDS = [("bert", "bert"), ("roberta", "roberta"), ("electra", "bert"), ("albert", "bert"), ("modernbert", "gpt2")]


def start(folders: tuple[Path, Path], words: tuple[str, ...] = WORDS, **more: Any) -> WarmStart:
    torch.manual_seed(0)  # of what no checkpoint holds: GPT-2's row for padding
    config = ModelConfig(str(folders[0]), str(folders[1]), added_tokens=words, **more)
    return warm_start(config, GenerationSettings(max_length=16))


def bases(folder: Path, encoder: str, decoder: str) -> tuple[Path, Path]:
    width = 16 if encoder == decoder or encoder == "electra" else 24
    first = mixes.make_base(folder / encoder, encoder, width)
    return first, first if decoder == encoder else mixes.make_base(folder / decoder, decoder)


def saved(started: WarmStart, folder: Path) -> Path:
    started.model.save_pretrained(folder)
    started.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("encoder", "decoder"), KINDS)
def test_a_word_is_one_token_that_begins_as_the_mean_of_its_pieces(encoder: str, decoder: str, tmp_path: Path) -> None:
    folders = bases(tmp_path, encoder, decoder)
    plain, started = start(folders, ()), start(folders)
    for before, after, side in (
        (plain.tokenizer, started.tokenizer, "encoder"),
        (summary_tokenizer(plain.tokenizer), summary_tokenizer(started.tokenizer), "decoder"),
    ):
        model, grown = getattr(plain.model, side), getattr(started.model, side)
        tables = [(model.get_input_embeddings().weight, grown.get_input_embeddings().weight)]
        if side == "decoder":
            heads = model.get_output_embeddings(), grown.get_output_embeddings()
            tables += [
                (getattr(heads[0], n), getattr(heads[1], n)) for n in ("weight", "bias") if heads[0].bias is not None
            ]
        for word in WORDS:
            pieces = before(word, add_special_tokens=False)["input_ids"]
            (token,) = after(word, add_special_tokens=False)["input_ids"]
            assert len(pieces) > 1
            assert token >= len(before.get_vocab())
            for old, new in tables:
                torch.testing.assert_close(new[token], old[pieces].mean(0))
                torch.testing.assert_close(new[: len(old)], old, rtol=0, atol=0)
    target = summary_tokenizer(started.tokenizer)
    assert target.decode(target(TEXT)["input_ids"], skip_special_tokens=True).strip().startswith("#kaban1# ")
    ids = started.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert (ids == started.tokenizer.convert_tokens_to_ids(WORDS[0])).sum() == 2
    said = started.model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2)
    assert said.max() < started.model.config.decoder.vocab_size


@pytest.mark.parametrize("settings", [{"share_embeddings": True}, {"share_weights": True}])
def test_new_rows_are_shared_as_the_others_are_and_survive_the_disk(settings: dict[str, Any], tmp_path: Path) -> None:
    started = start(bases(tmp_path, "bert", "bert"), **settings)
    model = started.model
    weight = model.encoder.get_input_embeddings().weight
    assert model.decoder.get_input_embeddings().weight is weight
    assert model.decoder.get_output_embeddings().weight is weight
    assert model.config.encoder.vocab_size == model.config.decoder.vocab_size == len(weight) == model.config.vocab_size
    read, tokenizer = load_model(saved(started, tmp_path / "run"))
    assert tokenizer(TEXT)["input_ids"] == started.tokenizer(TEXT)["input_ids"]
    plain_copy(read).save_pretrained(tmp_path / "plain")
    stock, loading = EncoderDecoderModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not loading["missing_keys"]
    ids = started.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    ours, theirs = (m.eval()(input_ids=ids, decoder_input_ids=ids).logits for m in (model, stock))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_a_run_goes_on_from_one_without_the_words(tmp_path: Path) -> None:
    folders = bases(tmp_path, "bert", "bert")
    earlier = start(folders, (), share_embeddings=True)
    with torch.no_grad():
        earlier.model.encoder.get_input_embeddings().weight.normal_()
        earlier.model.decoder.get_output_embeddings().bias.normal_()
    started = start(folders, share_embeddings=True)
    load_weights(started, saved(earlier, tmp_path / "run"))
    pieces = earlier.tokenizer(WORDS[0], add_special_tokens=False)["input_ids"]
    token = started.tokenizer.convert_tokens_to_ids(WORDS[0])
    for side in ("encoder", "decoder"):
        old, new = (getattr(s.model, side).get_input_embeddings().weight for s in (earlier, started))
        torch.testing.assert_close(new[token], old[pieces].mean(0))
        torch.testing.assert_close(new[: len(old)], old, rtol=0, atol=0)
    old, new = (s.model.decoder.get_output_embeddings().bias for s in (earlier, started))
    torch.testing.assert_close(new[token], old[pieces].mean(0))
    # A run with the same words takes its rows as they are.
    again = start(folders, share_embeddings=True)
    with torch.no_grad():
        started.model.encoder.get_input_embeddings().weight.normal_()
    load_weights(again, saved(started, tmp_path / "grown"))
    weights = [s.model.encoder.get_input_embeddings().weight for s in (started, again)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.parametrize("words", [(), WORDS[::-1], (WORDS[0], "#other#")])
def test_other_words_than_the_earlier_runs_are_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    folders = bases(tmp_path, "bert", "bert")
    folder = saved(start(folders), tmp_path / "run")
    with pytest.raises(WarmStartError, match=r"is another one; are model\.added_tokens the same"):
        load_weights(start(folders, words), folder)


def test_a_word_of_the_vocabulary_stays_the_token_that_it_is(tmp_path: Path) -> None:
    folders = bases(tmp_path, "bert", "bert")
    plain, started = start(folders, ()), start(folders, ("kaban", "KABAN", "[SEP]"))
    assert started.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    assert started.model.config.vocab_size == plain.model.config.vocab_size


def test_a_word_of_letters_is_no_part_of_a_longer_one(tmp_path: Path) -> None:
    started = start(bases(tmp_path, "bert", "bert"), ("kabanloder", "#kaban1#"))
    word, mark = (started.tokenizer.convert_tokens_to_ids(w) for w in ("kabanloder", "#kaban1#"))
    assert word in started.tokenizer("kafin kabanloder.")["input_ids"]
    assert word not in started.tokenizer("kabanloderkafin")["input_ids"]
    assert mark in started.tokenizer("kafin#kaban1#'s")["input_ids"]


@pytest.mark.parametrize(
    ("words", "message"), [(("\u200b",), "sees nothing in"), (("LoderKaban", "loderkaban"), "is the same as")]
)
def test_words_that_the_tokenizer_cannot_tell_are_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(WarmStartError, match=message):
        start(bases(tmp_path, "bert", "bert"), words)


@pytest.mark.parametrize("words", [(), WORDS])
@pytest.mark.parametrize(("encoder", "decoder"), KINDS)
def test_every_mix_takes_the_weights_of_an_earlier_run(
    encoder: str, decoder: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    folders = bases(tmp_path, encoder, decoder)
    earlier, later = start(folders, words[:1]), start(folders, words)
    with torch.no_grad():
        earlier.model.decoder.get_input_embeddings().weight.normal_()
    load_weights(later, saved(earlier, tmp_path / "run"))
    old, new = (s.model.decoder.get_input_embeddings().weight for s in (earlier, later))
    torch.testing.assert_close(new[: len(old)], old, rtol=0, atol=0)


@pytest.mark.parametrize(("encoder", "decoder"), KINDS)
def test_a_word_that_a_model_without_it_wrote_is_the_token(encoder: str, decoder: str, tmp_path: Path) -> None:
    """A label of a teacher whose vocabulary lacks the word, decoded and read again."""
    folders, speakers = bases(tmp_path, encoder, decoder), (".kaban.", ".loder.")
    teacher, student = (start(folders, words).tokenizer for words in ((), speakers))
    reader, ids = summary_tokenizer(teacher), summary_tokenizer(student).convert_tokens_to_ids(list(speakers))
    said = reader.decode(reader("kafin .kaban. rusan .loder. lohom")["input_ids"], skip_special_tokens=True)
    (row,) = tokenise([Pair("0", "kafin", (said,))], student, DataConfig("-"))
    assert [token for token in row["labels"] if token in ids] == ids


def test_what_only_looks_like_the_word_stays_as_it_is(tmp_path: Path) -> None:
    uncased = start(bases(tmp_path, "bert", "bert")).tokenizer
    assert rejoin(["# KABAN1 # # kaban11 # kaban1 #"], uncased) == ["#kaban1# # kaban11 #kaban1#"]
    accented = start(bases(tmp_path, "bert", "bert"), ("Kabán-1",)).tokenizer
    assert rejoin(["kaban - 1 kafin Kabán -1"], accented) == ["Kabán-1 kafin Kabán-1"]
    texts = ["# kaban1 kafin", "nothing of it", ""]
    assert rejoin(texts, uncased) == texts
    letters = start(bases(tmp_path, "bert", "bert"), ("kaban.lohom", "kafin.")).tokenizer
    assert rejoin(["akaban . lohom kaban . lohoma kaban. lohom kafin ."], letters) == [
        "akaban . lohom kaban . lohoma kaban.lohom kafin."
    ]


@pytest.mark.parametrize("word", ["", " ", "#kaban1# "])
def test_a_word_that_white_space_ends_is_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(WarmStartError, match=r"model\.added_tokens: .* without white space at its ends"):
        start(bases(tmp_path, "bert", "bert"), (word,))


def test_two_tokenizers_learn_the_words_each_with_its_own_pieces(tmp_path: Path) -> None:
    started = start(bases(tmp_path, "modernbert", "gpt2"))
    assert isinstance(started.tokenizer, TokenizerPair)
    ids = [side.convert_tokens_to_ids(WORDS[0]) for side in (started.tokenizer.source, started.tokenizer.target)]
    assert started.model.encoder.get_input_embeddings().num_embeddings > ids[0]
    assert started.model.decoder.get_input_embeddings().num_embeddings > ids[1]
