"""What is warm, what is shared, and what reaches the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertModel, EncoderDecoderModel

from train.config import GenerationSettings, ModelConfig
from train.warm_start import WarmStart, WarmStartError, load_model, load_tokenizer, plain_copy, warm_start

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
