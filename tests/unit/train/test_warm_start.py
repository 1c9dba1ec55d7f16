"""What is warm, what is shared, and what reaches the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertModel, EncoderDecoderModel

from tests import mixes
from train.config import DataConfig, GenerationSettings, ModelConfig
from train.tokenizer_pair import summary_tokenizer
from train.warm_start import (
    WarmStart,
    WarmStartError,
    fit_limits,
    load_model,
    load_tokenizer,
    load_weights,
    plain_copy,
    source_limit,
    warm_start,
)
from train.weight_sharing import spread

from .conftest import CLS, PAD, SEP, make_base

ENCODER, DECODER = "encoder.embeddings.word_embeddings.weight", "decoder.bert.embeddings.word_embeddings.weight"
HEAD = "decoder.cls.predictions.decoder.weight"


def start(encoder: Path, decoder: Path | None = None, share: bool = False) -> WarmStart:
    config = ModelConfig(str(encoder), str(decoder or encoder), share_embeddings=share, hidden_dropout=0.0)
    return warm_start(config, GenerationSettings(max_length=16))


def logits(model: EncoderDecoderModel) -> torch.Tensor:
    source, target = torch.tensor([[CLS, 7, 8, 9, SEP]]), torch.tensor([[CLS, 7]])
    return model.eval()(input_ids=source, decoder_input_ids=target).logits


def test_both_sides_are_warm_and_only_cross_attention_and_head_are_new(base: Path) -> None:
    started = start(base)
    weights, model = load_file(base / "model.safetensors"), started.model
    torch.testing.assert_close(model.encoder.state_dict()["encoder.layer.1.output.dense.weight"],
                               weights["encoder.layer.1.output.dense.weight"])  # fmt: skip
    torch.testing.assert_close(model.decoder.bert.state_dict()["encoder.layer.1.output.dense.weight"],
                               weights["encoder.layer.1.output.dense.weight"])  # fmt: skip
    assert all("crossattention" in name or "cls.predictions" in name for name in started.new_weights)
    assert len([name for name in started.new_weights if "crossattention" in name]) == 2 * 10


def test_special_tokens_and_decode_settings(base: Path) -> None:
    model = start(base).model
    assert (model.config.decoder_start_token_id, model.config.pad_token_id) == (CLS, PAD)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (CLS, SEP, PAD)
    assert (generation.num_beams, generation.max_length) == (4, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_are_fp32_whatever_the_checkpoint_has(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_base(tmp_path, dtype)
    assert load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"].dtype == dtype
    assert {parameter.dtype for parameter in start(folder).model.parameters()} == {torch.float32}


def test_shared_embeddings_are_one_parameter_and_one_gradient(base: Path) -> None:
    model = start(base, share=True).model
    names = dict(model.named_parameters(remove_duplicate=False))
    assert names[ENCODER] is names[DECODER] is names[HEAD]
    assert (
        sum(p.numel() for p in start(base).model.parameters()) - sum(p.numel() for p in model.parameters()) == 65 * 32
    )
    before = logits(model).detach()
    with torch.no_grad():
        names[ENCODER][7] += 1.0
    assert not torch.allclose(logits(model), before)
    assert names[DECODER][7].equal(names[ENCODER][7])


@pytest.mark.parametrize("share", [True, False])
def test_a_saved_model_loads_as_it_was(base: Path, tmp_path: Path, share: bool) -> None:
    started = start(base, share=share)
    started.model.save_pretrained(tmp_path)
    started.tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    torch.testing.assert_close(logits(model), logits(started.model), rtol=0, atol=0)
    names = dict(model.named_parameters(remove_duplicate=False))
    assert (names[ENCODER] is names[DECODER]) is share


def test_a_run_with_shared_embeddings_is_read_back_shared(run: Path) -> None:
    model, _ = load_model(run / "best")
    assert model.encoder.get_input_embeddings().weight is model.decoder.get_input_embeddings().weight


def test_a_plain_copy_is_complete_for_stock_transformers(base: Path, tmp_path: Path) -> None:
    started = start(base, share=True)
    copy = plain_copy(started.model)
    copy.save_pretrained(tmp_path)
    loaded, loading = EncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(logits(loaded), logits(started.model), rtol=0, atol=0)
    with torch.no_grad():
        copy.encoder.get_input_embeddings().weight.zero_()
    assert started.model.encoder.get_input_embeddings().weight.abs().sum() > 0
    assert copy.decoder.get_input_embeddings().weight.abs().sum() > 0


def test_a_file_that_lacks_weights_is_refused(base: Path, tmp_path: Path) -> None:
    plain_copy(start(base).model).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decoder.bert.encoder.layer.0.crossattention.self.key.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WarmStartError, match="lacks 1 weights"):
        load_model(tmp_path)


def test_different_vocabularies_are_refused(base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other")
    model = BertModel.from_pretrained(other)
    model.resize_token_embeddings(70)
    model.save_pretrained(other)
    with pytest.raises(WarmStartError, match="65 tokens and the decoder 70"):
        start(base, other)


def mixed(encoder: Path, decoder: Path, **more: Any) -> WarmStart:
    return warm_start(ModelConfig(str(encoder), str(decoder), **more), GenerationSettings(max_length=16))


@pytest.mark.parametrize(("kind", "stack"), [("bert", "bert"), ("roberta", "roberta"), ("electra", "electra")])
def test_shared_weights_are_one_set_but_for_cross_attention_and_head(kind: str, stack: str, tmp_path: Path) -> None:
    folder = mixes.make_base(tmp_path / "base", kind)
    started = mixed(folder, folder, share_weights=True)
    names = dict(started.model.named_parameters(remove_duplicate=False))
    encoders = {id(parameter) for name, parameter in names.items() if name.startswith("encoder.")}
    own = {n for n, parameter in names.items() if n.startswith("decoder.") and id(parameter) not in encoders}
    assert own
    assert all("crossattention" in name or not name.startswith(f"decoder.{stack}.") for name in own)
    # What an optimiser is given: each parameter once, the shared ones as warm.
    assert not started.new_weights & {
        name for name, _ in started.model.named_parameters() if name.startswith("encoder.")
    }
    assert {name for name in started.new_weights if "crossattention" in name} <= own


def test_shared_weights_are_saved_once_and_read_back_shared(tmp_path: Path) -> None:
    folder = mixes.make_base(tmp_path / "base", "roberta")
    started = mixed(folder, folder, share_weights=True)
    started.model.save_pretrained(tmp_path / "run")
    started.tokenizer.save_pretrained(tmp_path / "run")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in started.model.parameters())
    model, _ = load_model(tmp_path / "run")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in started.model.parameters())
    torch.testing.assert_close(logits(model), logits(started.model), rtol=0, atol=0)
    plain_copy(model).save_pretrained(tmp_path / "plain")
    loaded, loading = EncoderDecoderModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not loading["missing_keys"]
    torch.testing.assert_close(logits(loaded), logits(started.model), rtol=0, atol=0)


def test_evenly_spread_layers_are_those_of_distilbart() -> None:
    assert [spread(12, n) for n in (1, 2, 3, 6)] == [[0], [0, 11], [0, 6, 11], [0, 2, 4, 7, 9, 11]]
    assert spread(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(("kind", "layer"), [("bert", "bert.encoder.layer"), ("gpt2", "transformer.h")])
def test_a_decoder_of_fewer_layers_has_every_second_one(kind: str, layer: str, tmp_path: Path) -> None:
    encoder = mixes.make_base(tmp_path / "encoder", "bert")
    decoder = mixes.make_base(tmp_path / kind, kind, layers=6)
    started = mixed(encoder, decoder, decoder_layers=3)
    whole = mixed(encoder, decoder)
    assert started.model.config.decoder.num_hidden_layers == 3
    for index, old in enumerate((0, 2, 5)):
        kept = started.model.decoder.get_submodule(f"{layer}.{index}").state_dict()
        for name, tensor in whole.model.decoder.get_submodule(f"{layer}.{old}").state_dict().items():
            if "cross" not in name:  # new on both sides
                torch.testing.assert_close(kept[name], tensor, rtol=0, atol=0)
    assert {name for name, _ in started.model.named_parameters() if "cross" in name} <= started.new_weights
    assert len([name for name in started.new_weights if "cross" in name]) * 2 == len(
        [name for name in whole.new_weights if "cross" in name]
    )
    # The cache that `generate` keeps goes by the layers' own numbers.
    ids = torch.tensor([[2, 8, 9, 3]])
    said = started.model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2)
    assert said.shape[1] > 8  # the least length


def test_weights_of_a_deeper_decoder_are_those_of_the_layers_that_are_kept(tmp_path: Path) -> None:
    base = mixes.make_base(tmp_path / "base", "bert", layers=6)
    deep = mixed(base, base)
    torch.nn.init.normal_(deep.model.decoder.bert.encoder.layer[5].crossattention.self.query.weight)
    _saved(deep, tmp_path / "deep")
    shallow = mixed(base, base, decoder_layers=3)
    load_weights(shallow, tmp_path / "deep")
    for index, old in enumerate((0, 2, 5)):
        kept = shallow.model.decoder.get_submodule(f"bert.encoder.layer.{index}").state_dict()
        for name, tensor in deep.model.decoder.get_submodule(f"bert.encoder.layer.{old}").state_dict().items():
            torch.testing.assert_close(kept[name], tensor, rtol=0, atol=0)
    with pytest.raises(WarmStartError, match="of another model"):
        load_weights(deep, _saved(shallow, tmp_path / "shallow"))


def _saved(started: WarmStart, folder: Path) -> Path:
    started.model.save_pretrained(folder)
    started.tokenizer.save_pretrained(folder)
    return folder


def test_gpt2_gets_a_row_for_its_padding_token(tmp_path: Path) -> None:
    encoder, decoder = mixes.make_base(tmp_path / "bert", "bert"), mixes.make_base(tmp_path / "gpt2", "gpt2")
    started = mixed(encoder, decoder)
    target = summary_tokenizer(started.tokenizer)
    model, config = started.model, started.model.config
    assert config.decoder.vocab_size == len(target) == model.decoder.get_input_embeddings().weight.shape[0]
    assert config.pad_token_id == model.generation_config.pad_token_id == config.decoder.pad_token_id == len(target) - 1
    # Shifted labels: the start token is there for the decoder to see, and what is padding is no other token.
    labels = torch.tensor([[5, 6, config.eos_token_id], [7, config.eos_token_id, -100]])
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    assert (inputs[:, 0] == config.decoder_start_token_id).all()
    assert ((inputs == config.pad_token_id) == torch.tensor([[False] * 3, [False] * 3])).all()


KINDS = sorted({kind for mix in mixes.MIXES for kind in (mix.encoder, mix.decoder)} | set(mixes.BASELINES))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_what_was_asked_for_in_every_kind(kind: str, tmp_path: Path) -> None:
    folder = mixes.make_base(tmp_path / kind, kind)
    config: dict[str, Any] = {"hidden_dropout": 0.25, "attention_dropout": 0.125}
    if kind in mixes.BASELINES:
        module = mixed(folder, folder, seq2seq=str(folder), **config).model
    elif kind == "gpt2":
        module = mixed(mixes.make_base(tmp_path / "bert", "bert"), folder, **config).model.decoder
    else:
        module = mixed(folder, mixes.make_base(tmp_path / "decoder", "bert"), **config).model.encoder
    rates = {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates <= {0.25, 0.125, 0.0}
    assert 0.25 in rates or kind in mixes.BASELINES


@pytest.mark.parametrize(
    ("encoder", "decoder", "more", "message"),
    [
        ("bert", "roberta", {"share_weights": True}, "model.share_weights: .* tokenizers of their own"),
        ("bert", "gpt2", {"share_embeddings": True}, "model.share_embeddings: .* tokenizers of their own"),
        ("bert", "electra", {"share_weights": True}, "of different kinds or sizes"),
        ("bert", "distilbert", {}, "is a distilbert; as decoder there may be: bert"),
        ("gpt2", "bert", {}, "is a gpt2; as encoder there may be: bert"),
        ("bert", "bert", {"decoder_layers": 3}, "model.decoder_layers is 3; the decoder has 1 to 2 layers"),
        ("bert", "bert", {"decoder_layers": 0}, "model.decoder_layers is 0"),
        ("bert", "bert", {"seq2seq": "bert"}, "is a bert; as model.seq2seq there may be: bart, pegasus"),
        ("bert", "bert", {"seq2seq": "bart", "decoder_layers": 1}, "is a whole model"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    encoder: str, decoder: str, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folders = {
        kind: mixes.make_base(tmp_path / kind, kind) for kind in {encoder, decoder, more.get("seq2seq", encoder)}
    }
    if "seq2seq" in more:
        more = {**more, "seq2seq": str(folders[more["seq2seq"]])}
    with pytest.raises(WarmStartError, match=message):
        mixed(folders[encoder], folders[decoder], **more)


@pytest.mark.parametrize(
    ("kind", "positions"), [("bert", 64), ("roberta", 64), ("mpnet", 64), ("bart", 64), ("modernbert", 64)]
)
def test_the_source_limit_is_what_positions_hold(kind: str, positions: int, tmp_path: Path) -> None:
    """RoBERTa's and MPNet's tables have two rows more, which no token takes."""
    folder = mixes.make_base(tmp_path / kind, kind)
    whole = {"seq2seq": str(folder)} if kind == "bart" else {}
    model = mixed(folder, mixes.make_base(tmp_path / "decoder", "bert"), **whole).model
    assert source_limit(model) == positions
    fit_limits(model, DataConfig(max_source_tokens=positions, max_target_tokens=64))
    too_long: list[tuple[dict[str, Any], str]] = [
        ({"max_source_tokens": positions + 1}, "source"),
        ({"max_target_tokens": 65}, "target"),
    ]
    for change, name in too_long:
        with pytest.raises(WarmStartError, match=rf"data.max_{name}_tokens is \d+; the model has positions for 64"):
            fit_limits(model, DataConfig(**{"max_source_tokens": 64, "max_target_tokens": 64, **change}))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "bart"])
def test_summaries_may_not_grow_past_the_decoders_positions(kind: str, tmp_path: Path) -> None:
    folder, decoder = mixes.make_base(tmp_path / "bert", "bert"), mixes.make_base(tmp_path / kind, kind)
    config = ModelConfig(str(folder), str(decoder), seq2seq=str(decoder) if kind == "bart" else None)
    data = DataConfig(max_source_tokens=64, max_target_tokens=64)
    fit_limits(warm_start(config, GenerationSettings(max_length=64)).model, data)
    with pytest.raises(WarmStartError, match=r"generation\.max_length is 65; the model has positions for 64 tokens"):
        fit_limits(warm_start(config, GenerationSettings(max_length=65)).model, data)


def test_computed_positions_are_limited_to_what_was_trained(tmp_path: Path) -> None:
    folders = [mixes.make_base(tmp_path / kind, kind) for kind in ("modernbert", "bert")]
    model = mixed(*folders).model
    ids = torch.tensor([[2, *range(8, 28), 3]])
    before = model.encoder(input_ids=ids).last_hidden_state
    fit_limits(model, DataConfig(max_source_tokens=24, max_target_tokens=16))
    assert source_limit(model) == 24
    again = plain_copy(model).encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(again, before.detach(), rtol=1e-5, atol=1e-6)


def test_a_tokenizer_that_cuts_and_pads_is_cured(base: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 ships both, at 128 tokens."""
    folder = shutil.copytree(base, tmp_path / "base")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(128)
    backend.enable_padding(length=128, pad_token="[PAD]", pad_id=PAD)
    backend.save(str(folder / "tokenizer.json"))
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["truncation"]["max_length"] == 128
    tokenizer = load_tokenizer(str(folder))
    counts = [len(ids) for ids in tokenizer(["w1 " * 598, "w1"], verbose=False)["input_ids"]]
    assert counts == [600, 3]


def test_a_run_with_shared_embeddings_loads_as_it_was_and_shares_nothing_else(base: Path, tmp_path: Path) -> None:
    """Encoder and decoder begin alike, so they are pulled apart first: else one in the other's place would not show."""
    started = start(base, share=True)
    with torch.no_grad():
        for name, parameter in started.model.named_parameters():
            if name.startswith("decoder.bert.encoder"):
                parameter.add_(1.0)
    started.model.save_pretrained(tmp_path)
    started.tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    expected = started.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    own = dict(loaded.named_parameters(remove_duplicate=False))
    shared = {name for name in own if any(name != other and own[name] is own[other] for other in own)}
    assert shared == {ENCODER, DECODER, HEAD, "decoder.cls.predictions.bias", "decoder.cls.predictions.decoder.bias"}


def test_weights_that_differ_are_not_taken_where_a_run_shares_them(base: Path, tmp_path: Path) -> None:
    apart = start(base)
    with torch.no_grad():
        apart.model.decoder.get_input_embeddings().weight.add_(1.0)
    apart.model.save_pretrained(tmp_path)
    apart.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WarmStartError, match=r"trained without sharing encoder\.embeddings\.word_embeddings\.weight"):
        load_weights(start(base, share=True), tmp_path)
    load_weights(start(base), tmp_path)
