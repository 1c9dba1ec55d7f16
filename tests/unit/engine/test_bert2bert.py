"""The network against transformers', and the shared cross-attention cache against a replicated one."""

from __future__ import annotations

from pathlib import Path

import torch

from app.engine.checkpoint import load_checkpoint
from app.engine.kv_cache import KVCache
from app.engine.models.bert2bert import Bert2Bert
from tests.tiny import EOS, START, VOCAB, tiny_model


def cache_for(model: Bert2Bert, slots: int, beams: int) -> KVCache:
    decoder = model.decoder
    cache = KVCache(
        decoder.num_hidden_layers,
        beams,
        decoder.num_attention_heads,
        decoder.head_size,
        64,
        64,
        model.device,
        model.dtype,
    )
    cache.grow(slots)
    return cache


@torch.inference_mode()
def test_logits_equal_transformers(tiny_folder: Path) -> None:
    model, reference = load_checkpoint(tiny_folder, "cpu", "float32").model, tiny_model(seed=3)
    source = torch.tensor([[START, 8, 9, 10, 11, EOS]])
    target = torch.tensor([[START, 20, 21, 22]])
    expected = reference(input_ids=source, decoder_input_ids=target).logits
    cache = cache_for(model, 1, 1)
    cache.write_cross(0, model.encode(source, torch.tensor([6]))[:, :, 0])
    for step in range(target.shape[1]):
        ours = model.decode(target[:, step : step + 1], torch.tensor([step]), cache, torch.tensor([6]), step + 1, 6)
        torch.testing.assert_close(ours[:, 0], expected[:, step], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_padding_changes_nothing(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    ids = torch.tensor([[START, 8, 9, EOS]])
    padded = torch.nn.functional.pad(ids, (0, 30), value=VOCAB - 1)
    ours = model.encode(padded, torch.tensor([4]))[..., :4, :]
    torch.testing.assert_close(ours, model.encode(ids, torch.tensor([4])), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_shared_cross_cache_equals_a_replicated_one(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    cross = model.encode(torch.tensor([[START, 8, 9, EOS]]), torch.tensor([4]))[:, :, 0]
    tokens = torch.tensor([[20, 21, 22]])
    shared, replicated = cache_for(model, 1, 3), cache_for(model, 3, 1)
    shared.write_cross(0, cross)
    for slot in range(3):
        replicated.write_cross(slot, cross)
    one = model.decode(tokens, torch.tensor([0]), shared, torch.tensor([4]), 1, 4)
    three = model.decode(tokens.T, torch.zeros(3, dtype=torch.int64), replicated, torch.full((3,), 4), 1, 4)
    torch.testing.assert_close(one[0], three[:, 0], rtol=1e-5, atol=1e-6)
