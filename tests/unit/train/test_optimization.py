"""The loss, the optimiser, and attention on the kernels that make a step fast."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import mixes
from train.data import tokenise
from train.finetune import finetune
from train.loading import collator
from train.optimization import build_optimizer, resolve_precision, slow_attention, smoothed_cross_entropy
from train.warm_start import warm_start

from .conftest import make_config, make_pairs


def backward(base: Path, data: Path, folder: Path, attention_dropout: float) -> None:
    """Forward and backward of a training batch with padding, with flash attention allowed and nothing else."""
    config = make_config(base, data, folder, model={"attention_dropout": attention_dropout})
    start = warm_start(config.model, config.generation)
    rows = [dict(row) for row in tokenise(make_pairs(4, seed=7), start.tokenizer, config.data)]
    batch = collator(start, config.data)(rows)
    assert not batch["attention_mask"].all()
    labels = batch.pop("labels")
    start.model.train()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        smoothed_cross_entropy(0.1)(start.model(**batch), labels).backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="each device has kernels and rules of its own")
def test_every_attention_of_a_step_runs_on_the_fast_kernel(base: Path, data: Path, tmp_path: Path) -> None:
    """Encoder, causal decoder and cross-attention, with masks; torch raises where the kernel cannot be used."""
    backward(base, data, tmp_path, attention_dropout=0.0)
    with pytest.raises(RuntimeError, match=r"[Nn]o .*(backend|kernel)"):
        backward(base, data, tmp_path, attention_dropout=0.1)


def test_attention_dropout_is_warned_of(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path, model={"attention_dropout": 0.1}, optim={"max_steps": 1})
    with pytest.warns(UserWarning, match=r"(en|de)coder: attention_probs_dropout_prob is 0.1") as caught:
        finetune(config)
    assert len(caught) == 2


def test_attention_that_is_not_sdpa_is_reported(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path)
    model = warm_start(config.model, config.generation).model
    assert slow_attention(model) == []
    model.encoder.set_attn_implementation("eager")
    assert slow_attention(model) == ["encoder: attention runs as 'eager', not as SDPA"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encoder.set_attn_implementation("sdpa")
    assert slow_attention(model) == []


@pytest.mark.parametrize("one_width", [True, False])
def test_new_weights_take_the_higher_rate(base: Path, data: Path, tmp_path: Path, one_width: bool) -> None:
    """Of two widths the encoder's output is projected, by weights that no checkpoint holds."""
    config = make_config(base, data, tmp_path)
    if not one_width:
        wide, narrow = (str(mixes.make_base(tmp_path / str(width), "bert", width)) for width in (24, 16))
        config = replace(config, model=replace(config.model, encoder=wide, decoder=narrow, share_embeddings=False))
    start = warm_start(config.model, config.generation)
    rates: dict[int, float] = {}
    for group in build_optimizer(start, config.optim).param_groups:
        rates.update({id(parameter): group["lr"] for parameter in group["params"]})
    new = ("crossattention", "cls.predictions", "enc_to_dec_proj")
    names = [name for name, _ in start.model.named_parameters()]
    assert any("enc_to_dec_proj" in name for name in names) is not one_width
    for name, parameter in start.model.named_parameters():
        assert rates[id(parameter)] == (8e-4 if any(part in name for part in new) else 2e-4), name


def test_adamw_is_fused_unless_told_otherwise(base: Path, data: Path, tmp_path: Path) -> None:
    for fused in (True, False):
        config = make_config(base, data, tmp_path, optim={"fused_adamw": fused})
        start = warm_start(config.model, config.generation)
        assert build_optimizer(start, config.optim).defaults["fused"] is fused


def test_the_loss_is_a_mean_over_tokens_of_the_whole_accumulated_batch() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [3, -100, -100]])
    outputs = type("Outputs", (), {"logits": logits})
    loss = smoothed_cross_entropy(0.0)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss(outputs, labels), expected)
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=6), expected / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_asked_for_is_kept(precision: str) -> None:
    assert resolve_precision(precision) == precision
