"""Two ways from documents to summaries say the same, and know the same of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertTokenizerFast

from train.config import DataConfig
from train.data import Pair
from train.evaluate import read_rows, summarise_rows
from train.records import EvaluationError
from train.summarise import build_engine, decode, engine_summariser, generate_summariser, own_params, run_engine

from .conftest import CLS, PAD, SEP, VOCABULARY, make_pairs, write_split

DOCUMENTS = [pair.document for pair in make_pairs(5)] + ["w1 " * 100, "w7"]


def test_the_engine_and_generate_say_the_same_and_count_the_same(exported: Path) -> None:
    params = own_params(exported)
    ours = engine_summariser(exported, build_engine(exported, params), params)(DOCUMENTS)
    theirs = generate_summariser(exported, batch_size=2)(DOCUMENTS)
    assert ours == theirs
    assert [summary.source_cut for summary in ours] == [False] * 5 + [True, False]
    assert ours[5].source_tokens == 102
    assert ours[6].source_tokens == 3


def test_summaries_come_in_the_order_of_their_documents_and_progress_grows(exported: Path) -> None:
    params = own_params(exported)
    for summarise in (
        engine_summariser(exported, build_engine(exported, params), params),
        generate_summariser(exported, batch_size=3),
    ):
        seen: list[int] = []
        both = summarise(DOCUMENTS, seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == len(DOCUMENTS)
        assert [summarise([text])[0].text for text in DOCUMENTS] == [summary.text for summary in both]


def test_an_output_that_the_limit_cuts_is_marked(exported: Path, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    path = model / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The end token is forbidden before the limit is reached.
    path.write_text(json.dumps(settings | {"max_length": 6, "min_length": 6}), encoding="utf-8")
    params = own_params(model)
    for summarise in (engine_summariser(model, build_engine(model, params), params), generate_summariser(model)):
        assert all(summary.at_limit and summary.tokens == 5 for summary in summarise(DOCUMENTS))


def test_decode_gives_texts_and_counts_the_cut_sources(exported: Path) -> None:
    params = own_params(exported)
    engine = build_engine(exported, params)
    texts, cut = decode(exported, engine, DOCUMENTS, params)
    assert texts == [summary.text for summary in engine_summariser(exported, engine, params)(DOCUMENTS)]
    assert cut == 1


def test_a_model_that_the_engine_does_not_have_goes_through_generate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(VOCABULARY),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=CLS,
        eos_token_id=SEP,
        decoder_start_token_id=SEP,
        forced_eos_token_id=SEP,
    )
    model = BartForConditionalGeneration(config)
    # The end token is forbidden up to the limit, and forced there.
    model.generation_config.min_length = model.generation_config.max_length = 8
    model.save_pretrained(tmp_path / "bart")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(tmp_path / "bart")
    write_split(tmp_path / "data", "test", [*make_pairs(2), Pair("long", "w3 " * 50, ("w1",))])
    rows = read_rows(DataConfig(path=str(tmp_path / "data")))
    found = summarise_rows(tmp_path / "bart", rows)
    assert [summary.source_cut for summary in found.summaries] == [False, False, True]
    assert found.facts["settings"]["decoded_by"] == "generate of transformers"
    assert [(summary.at_limit, summary.tokens) for summary in found.summaries] == [(True, 7)] * 3


def test_the_engine_summarises_in_8_bits_and_generate_refuses_to(exported: Path, data: Path) -> None:
    rows, params = read_rows(DataConfig(path=str(data))), own_params(exported)
    assert len(summarise_rows(exported, rows, dtype="int8").summaries) == len(rows.pairs)
    ours, exact = (
        run_engine(build_engine(exported, params, dtype=dtype), [[2, 5, 6, 3]], params) for dtype in ("int8", "float32")
    )
    assert ours[0].hypotheses[0].score != exact[0].hypotheses[0].score
    with pytest.raises(EvaluationError, match="int8 is the engine's alone"):
        summarise_rows(exported, rows, dtype="int8", through="generate")


def test_settings_that_the_engine_does_not_have_are_refused(exported: Path, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"num_beams": 0}), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"generation_config.json: num_beams must be at least 1"):
        own_params(model)


def test_settings_over_a_models_own_count_in_either_form(exported: Path, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    path = model / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(own | {"max_new_tokens": 9, "min_length": 4}), encoding="utf-8")
    found = own_params(model, {"max_length": 7, "min_new_tokens": 2, "do_sample": True, "seed": 5})
    assert (found.max_new_tokens, found.min_new_tokens, found.do_sample, found.seed) == (6, 2, True, 5)
    assert (own_params(model).max_new_tokens, own_params(model).min_new_tokens) == (9, 3)


def test_a_source_beyond_the_engine_is_said_plainly(exported: Path) -> None:
    params = dataclasses.replace(own_params(exported), num_beams=9, num_return_sequences=1)
    engine = build_engine(exported, own_params(exported))
    with pytest.raises(EvaluationError, match="num_beams, or samples: 9 is over the limit of 8"):
        decode(exported, engine, DOCUMENTS[:1], params)
