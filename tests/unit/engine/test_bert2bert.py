"""The network against transformers', and the shared cross-attention cache against a replicated one."""

from __future__ import annotations

from pathlib import Path

import torch

from app.engine.checkpoint import load_checkpoint
from app.engine.kv_cache import CacheShape, KVCache
from app.engine.models.bert2bert import Bert2Bert
from app.engine.top_candidates import BLOCK
from tests.tiny import EOS, START, VOCAB, tiny_model


def cache_for(model: Bert2Bert, slots: int, beams: int) -> KVCache:
    decoder = model.decoder
    shape = CacheShape(decoder.num_hidden_layers, beams, decoder.num_attention_heads, decoder.head_size, 64, 64)
    return KVCache(shape, slots, model.device, model.dtype)


@torch.inference_mode()
def test_logits_equal_transformers(tiny_folder: Path) -> None:
    model, reference = load_checkpoint(tiny_folder, "cpu", "float32").model, tiny_model(seed=3)
    source = torch.tensor([[START, 8, 9, 10, 11, EOS]])
    target = torch.tensor([[START, 20, 21, 22]])
    expected = reference(input_ids=source, decoder_input_ids=target).logits
    cache = cache_for(model, 1, 1)
    cache.write_cross(0, model.encode(source[0], [6]))
    for step in range(target.shape[1]):
        positions = torch.tensor([step])
        step_cache = cache.begin_step(positions, torch.tensor([6]), step + 1, 6, ragged=False)
        ours = model.decode(target[:, step : step + 1], positions, step_cache)
        torch.testing.assert_close(ours[:, 0, :VOCAB], expected[:, step], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_columns_behind_the_vocabulary_can_never_be_chosen(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    logits = model.lm_head(torch.randn(3, model.decoder.hidden_size))
    assert logits.shape[1] > VOCAB
    assert logits.shape[1] % BLOCK == 0
    assert (logits[:, VOCAB:] == -torch.inf).all()


@torch.inference_mode()
def test_sources_encoded_together_do_not_see_each_other(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    sources = [torch.tensor([START, *range(8, 8 + n), EOS]) for n in (1, 30, 7)]
    lengths = [len(ids) for ids in sources]
    together = [torch.split_with_sizes(layer, lengths) for layer in model.encode(torch.cat(sources), lengths)]
    for index, ids in enumerate(sources):
        for layer, alone in enumerate(model.encode(ids, [len(ids)])):
            torch.testing.assert_close(together[layer][index], alone, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_what_lies_behind_a_source_is_masked(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    cross = model.encode(torch.tensor([START, 8, 9, EOS]), [4])
    start, lengths = torch.tensor([0]), torch.tensor([4])
    exact, wider = cache_for(model, 1, 3), cache_for(model, 1, 3)
    for cache in (exact, wider):
        cache.write_cross(0, cross)
    wider.cross_keys[..., 4:, :] = 7.0
    wider.cross_values[..., 4:, :] = 7.0
    tokens = torch.tensor([[20, 21, 22]])
    expected = model.decode(tokens, start, exact.begin_step(start, lengths, 1, 4, ragged=False))
    ours = model.decode(tokens, start, wider.begin_step(start, lengths, 1, 9, ragged=True))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_shared_cross_cache_equals_a_replicated_one(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    cross = model.encode(torch.tensor([START, 8, 9, EOS]), [4])
    tokens = torch.tensor([[20, 21, 22]])
    shared, replicated = cache_for(model, 1, 3), cache_for(model, 3, 1)
    shared.write_cross(0, cross)
    for slot in range(3):
        replicated.write_cross(slot, cross)
    start, three_starts = torch.tensor([0]), torch.tensor([0, 0, 0])
    one = model.decode(tokens, start, shared.begin_step(start, torch.tensor([4]), 1, 4, ragged=False))
    three_caches = replicated.begin_step(three_starts, torch.tensor([4, 4, 4]), 1, 4, ragged=False)
    three = model.decode(tokens.T, three_starts, three_caches)
    torch.testing.assert_close(one[0], three[:, 0], rtol=1e-5, atol=1e-6)
