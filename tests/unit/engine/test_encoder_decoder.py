"""The networks against transformers', and the shared cross-attention cache against a replicated one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EncoderDecoderConfig, EncoderDecoderModel

from app.engine import kernels
from app.engine.checkpoint import CheckpointError, load_checkpoint
from app.engine.kv_cache import CacheShape, KVCache
from app.engine.models.bert_decoder import BertDecoder
from app.engine.models.bert_encoder import filled_up
from app.engine.models.encoder_decoder import EncoderDecoder
from app.engine.models.foreign_encoder import FOREIGN_ENCODERS
from app.engine.step_cache import KernelStepCache
from app.engine.top_candidates import BLOCK
from tests.tiny import DECODERS, ENCODERS, EOS, PAD, START, VOCAB, TinyShape, save, tiny_config, tiny_model

SHAPE = TinyShape(encoder_hidden=24, activation="gelu_new")


def cache_for(model: EncoderDecoder, slots: int, beams: int) -> KVCache:
    decoder = model.decoder.sizes
    shape = CacheShape(decoder.num_hidden_layers, beams, decoder.num_attention_heads, decoder.head_size, 64, 64)
    return KVCache(shape, slots, model.device, model.dtype)


def write_cross(cache: KVCache, slot: int, cross: Iterable[torch.Tensor]) -> None:
    """Of one source, whole."""
    for layer, kv in enumerate(cross):
        cache.write_cross(layer, slot, kv, [slice(None)])


def assert_equals(model: EncoderDecoder, reference: EncoderDecoderModel, source: list[int], target: list[int]) -> None:
    """Every step's logits, decoded token by token, equal transformers' over the whole target."""
    ids = torch.tensor([target])
    expected = reference(input_ids=torch.tensor([source]), decoder_input_ids=ids).logits
    cache = cache_for(model, 1, 1)
    write_cross(cache, 0, model.encode(torch.tensor(source), [len(source)]))
    for step in range(len(target)):
        positions = torch.tensor([step])
        step_cache = cache.begin_step(positions, torch.tensor([len(source)]), step + 1, len(source), ragged=False)
        ours = model.decode(ids[:, step : step + 1], positions, step_cache)
        torch.testing.assert_close(ours[:, 0, :VOCAB], expected[:, step], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_logits_equal_transformers(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    assert_equals(model, tiny_model(seed=3), [START, 8, 9, 10, 11, EOS], [START, 20, 21, 22])


@pytest.mark.parametrize("decoder", DECODERS)
@torch.inference_mode()
def test_every_decoder_equals_transformers(decoder: str, tmp_path: Path) -> None:
    reference = tiny_model(5, shape=replace(SHAPE, decoder=decoder))
    model = load_checkpoint(save(reference, tmp_path), "cpu", "float32").model
    assert_equals(model, reference, [START, 8, 9, 10, 11, EOS], [START, 20, 21, 22])


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.inference_mode()
def test_every_encoder_equals_transformers(encoder: str, tmp_path: Path) -> None:
    reference = tiny_model(6, shape=replace(SHAPE, encoder=encoder))
    model = load_checkpoint(save(reference, tmp_path), "cpu", "float32").model
    assert_equals(model, reference, [START, *range(8, 40), EOS], [START, 20])


@pytest.mark.parametrize(("dtype", "faster"), [("bfloat16", True), ("bfloat16", False), ("int8", False)])
@pytest.mark.parametrize("decoder", DECODERS)
@torch.inference_mode()
def test_every_decoder_comes_close_in_fewer_bits(
    decoder: str, dtype: str, faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two steps, by the library in bf16 and, where there are kernels, by them with heads of whole vectors."""
    monkeypatch.setattr(kernels, "_bfloat16_is_faster", lambda: faster)
    shape_of = replace(SHAPE, decoder=decoder, hidden=32, heads=2, encoder_hidden=32, encoder_heads=2)
    reference = tiny_model(5, sharpness=1.0, shape=shape_of)
    model = load_checkpoint(save(reference, tmp_path), "cpu", dtype).model
    source, target = torch.tensor([START, 8, 9, 10, EOS]), torch.tensor([[START, 20]])
    expected = reference(input_ids=source[None], decoder_input_ids=target).logits
    sizes = model.decoder.sizes
    shape = CacheShape(sizes.num_hidden_layers, 1, sizes.num_attention_heads, sizes.head_size, 64, 64)
    cache = KVCache(shape, 1, model.device, model.attention_dtype, model.dtype)
    write_cross(cache, 0, model.encode(source, [5]))
    for step in range(2):
        at = torch.tensor([step])
        seen = cache.begin_step(at, torch.tensor([5]), step + 1, 5, ragged=False)
        by_kernels = not faster and kernels.cpu_kernels_for(model.device, torch.float32) is not None
        assert isinstance(seen, KernelStepCache) is by_kernels or dtype == "int8"
        ours = model.decode(target[:, step : step + 1], at, seen)[:, 0, :VOCAB].float()
        apart = (ours - expected[:, step]).square().mean().sqrt()
        assert apart < 0.15 * expected[:, step].std()


def foreign(kind: str, tmp_path: Path) -> tuple[EncoderDecoderModel, Path]:
    """A tiny model whose encoder is transformers' own, projected onto a BERT decoder."""
    torch.manual_seed(7)
    more = {"albert": {"embedding_size": 12}, "modernbert": {"cls_token_id": START, "sep_token_id": EOS}}.get(kind, {})
    encoder = tiny_config(kind, SHAPE, 24, 2, 2, **more)
    if kind == "modernbert":
        encoder.local_attention, encoder.global_attn_every_n_layers = 8, 2
    decoder = tiny_config("bert", SHAPE, 16, 2, 2, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, EOS
    model = EncoderDecoderModel(config).eval()
    model.generation_config.update(decoder_start_token_id=START, eos_token_id=EOS, pad_token_id=PAD)
    return model, save(model, tmp_path)


@pytest.mark.parametrize("kind", FOREIGN_ENCODERS)
@torch.inference_mode()
def test_an_encoder_of_transformers_reads_sources_as_if_each_were_alone(kind: str, tmp_path: Path) -> None:
    """FNet too, which has no mask: padding would change what it says of every token."""
    reference, folder = foreign(kind, tmp_path)
    model = load_checkpoint(folder, "cpu", "float32").model
    sources = [[START, *range(8, 8 + n), EOS] for n in (1, 30, 7, 30)]
    lengths = [len(source) for source in sources]
    together = torch.split(model.encoder(torch.tensor(list(chain(*sources))), lengths), lengths)
    for source, ours in zip(sources, together, strict=True):
        expected = reference.encoder(input_ids=torch.tensor([source])).last_hidden_state[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert_equals(model, reference, sources[1], [START, 20, 21])


@torch.inference_mode()
def test_fnet_sees_padding(tmp_path: Path) -> None:
    """Why sources go through it without: the same text, padded, is another text to it, mask or no mask."""
    reference, _ = foreign("fnet", tmp_path)
    ids, mask = torch.tensor([[START, 8, 9, EOS, PAD, PAD]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    alone = reference.encoder(input_ids=ids[:, :4]).last_hidden_state
    padded = reference.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, :4]
    assert (alone - padded).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_fnet_is_served_in_16_bits(dtype: str, tmp_path: Path) -> None:
    """torch's Fourier transform has no bfloat16: the encoder computes in fp32, the decoder in what was asked for."""
    reference, folder = foreign("fnet", tmp_path)
    model = load_checkpoint(folder, "cpu", dtype).model
    ids = [START, 8, 9, EOS]
    encoded = model.encoder(torch.tensor(ids), [4])
    assert encoded.dtype == model.dtype
    expected = reference.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(encoded.float(), expected, rtol=0.02, atol=0.02)


@torch.inference_mode()
def test_padding_tokens_in_a_text_stand_where_roberta_puts_them(tmp_path: Path) -> None:
    """They take no position of their own, in a source or in a summary."""
    reference = tiny_model(8, shape=TinyShape(decoder="roberta", encoder="roberta"))
    model = load_checkpoint(save(reference, tmp_path), "cpu", "float32").model
    assert_equals(model, reference, [START, 8, PAD, 9, PAD, PAD, 10, EOS], [START])
    cache = cache_for(model, 1, 1)
    source, target = torch.tensor([[START, 8, EOS]]), [START, PAD, 21]
    write_cross(cache, 0, model.encode(source[0], [3]))
    past = None
    for step, token in enumerate(target):  # as `generate` does: with its own cache, a token at a time
        ids, at = torch.tensor([[token]]), torch.tensor([step])
        out = reference(input_ids=source, decoder_input_ids=ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        ours = model.decode(ids, at, cache.begin_step(at, torch.tensor([3]), step + 1, 3, ragged=False))
        torch.testing.assert_close(ours[0, :, :VOCAB], out.logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "decoder", "source", "target"),
    [("bert", "bert", 64, 63), ("roberta", "roberta", 64, 63), ("distilbert", "gpt2", 64, 63)],
)
def test_limits_are_the_tokens_that_positions_hold(
    encoder: str, decoder: str, source: int, target: int, tmp_path: Path
) -> None:
    shape = TinyShape(encoder=encoder, decoder=decoder)
    info = load_checkpoint(save(tiny_model(9, shape=shape), tmp_path), "cpu", "float32").info
    assert (info.max_source_tokens, info.max_target_tokens) == (source, target)


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        (
            "encoder",
            {"model_type": "longformer"},
            "encoder in config.json .* model_type is 'longformer'",
        ),
        (
            "decoder",
            {"model_type": "distilbert"},
            "decoder in config.json .* model_type is 'distilbert'",
        ),
        ("decoder", {"hidden_act": "silu"}, "hidden_act is 'silu'; known: gelu"),
        ("encoder", {"position_embedding_type": "relative_key"}, "is 'relative_key', not 'absolute'"),
        ("encoder", {"model_type": "albert"}, r"the weights lack|the weights are not those of albert"),
    ],
)
def test_what_cannot_be_served_says_which_side_and_why(
    side: str, change: dict[str, str], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config[side] |= change
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, "cpu", "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": "4"}, "generation_config.json: num_beams must be a whole number; it is '4'"),
        ({"max_time": 1.0}, "max_time is 1.0; the engine does not have this option yet"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id is \[2, 3\]; the engine takes one token"),
    ],
)
def test_decode_options_that_cannot_be_served_are_named(
    changes: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(with_generation(tiny_folder, tmp_path, changes), "cpu", "float32")


def test_a_special_token_that_is_null_stands_elsewhere(tiny_folder: Path, tmp_path: Path) -> None:
    """In config.json; padding may be the end token, as in transformers."""
    own = load_checkpoint(tiny_folder, "cpu", "float32").info
    folder = with_generation(tiny_folder, tmp_path, {"eos_token_id": None, "pad_token_id": None})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["pad_token_id"]
    for padding, expected in (({"pad_token_id": own.pad_token_id}, own.pad_token_id), ({}, own.eos_token_id)):
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": EOS, **padding}), encoding="utf-8")
        assert load_checkpoint(folder, "cpu", "float32").info == replace(own, pad_token_id=expected)


def with_generation(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of the model with other decode settings."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    _, folder = foreign("mpnet", tmp_path)
    for missing in ("encoder.encoder.relative_attention_bias.weight", "decoder.bert.encoder.layer.0.output.dense.bias"):
        weights = load_file(folder / "model.safetensors")
        del weights[missing]
        (tmp_path / "less").mkdir(exist_ok=True)
        for name in ("config.json", "generation_config.json"):
            (tmp_path / "less" / name).write_bytes((folder / name).read_bytes())
        save_file(weights, tmp_path / "less" / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"the weights lack .{missing}"):
            load_checkpoint(tmp_path / "less", "cpu", "float32")


@torch.inference_mode()
def test_a_layers_keys_and_values_are_computed_when_they_are_asked_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    form: Any = type(model.decoder.cross_key_values[0])
    product = form.__call__
    products: list[Tensor] = []

    def counted(*args: Any) -> Tensor:
        products.append(product(*args))
        return products[-1]

    cross = model.encode(torch.tensor([START, 8, EOS]), [3])
    next(cross)  # the encoder has done its part
    monkeypatch.setattr(form, "__call__", counted)
    assert [len(products) for _ in cross] == [*range(1, model.decoder.sizes.num_hidden_layers)]


def test_a_loaded_model_keeps_nothing_of_the_file(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    assert model.dtype is torch.float32  # the file's: nothing had to be converted
    assert str(tiny_folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")


@torch.inference_mode()
def test_columns_behind_the_vocabulary_can_never_be_chosen(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    assert isinstance(model.decoder, BertDecoder)
    logits = model.decoder.lm_head(torch.randn(3, model.decoder.sizes.hidden_size))
    assert logits.shape[1] > VOCAB
    assert logits.shape[1] % BLOCK == 0
    assert (logits[:, VOCAB:] == -torch.inf).all()


def test_the_encoder_meets_few_numbers_of_rows() -> None:
    filled = [filled_up(rows) for rows in range(1, 4097)]
    assert len(set(filled)) == 80
    for rows, more in enumerate(filled, 1):
        assert rows <= more <= max(rows + 15, 1.0625 * rows)


@pytest.mark.parametrize(
    ("capability", "activation", "rows"), [("AVX512", "gelu", 16), ("AVX2", "gelu_new", 16), ("AVX2", "gelu", 5)]
)
@pytest.mark.skipif(kernels.cpu_kernels() is None, reason="kernels do not work: test_cpu_kernels.py")
@torch.inference_mode()
def test_tokens_are_filled_up_where_code_is_kept_for_each_number_of_rows(
    capability: str, activation: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is AVX-512 without VNNI, for which there are no kernels in fp32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    folder = save(tiny_model(1, shape=TinyShape(activation=activation)), tmp_path)
    model = load_checkpoint(folder, "cpu", "float32").model
    assert len(model.encoder(torch.tensor([START, 8, 9, 10, EOS]), [5])) == rows


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
    cross = list(model.encode(torch.tensor([START, 8, 9, EOS]), [4]))
    start, lengths = torch.tensor([0]), torch.tensor([4])
    exact, wider = cache_for(model, 1, 3), cache_for(model, 1, 3)
    for cache in (exact, wider):
        write_cross(cache, 0, cross)
    wider.cross_keys[..., 4:, :] = 7.0
    wider.cross_values[..., 4:, :] = 7.0
    tokens = torch.tensor([[20, 21, 22]])
    expected = model.decode(tokens, start, exact.begin_step(start, lengths, 1, 4, ragged=False))
    ours = model.decode(tokens, start, wider.begin_step(start, lengths, 1, 9, ragged=True))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_shared_cross_cache_equals_a_replicated_one(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder, "cpu", "float32").model
    cross = list(model.encode(torch.tensor([START, 8, 9, EOS]), [4]))
    tokens = torch.tensor([[20, 21, 22]])
    shared, replicated = cache_for(model, 1, 3), cache_for(model, 3, 1)
    write_cross(shared, 0, cross)
    for slot in range(3):
        write_cross(replicated, slot, cross)
    start, three_starts = torch.tensor([0]), torch.tensor([0, 0, 0])
    one = model.decode(tokens, start, shared.begin_step(start, torch.tensor([4]), 1, 4, ragged=False))
    three_caches = replicated.begin_step(three_starts, torch.tensor([4, 4, 4]), 1, 4, ragged=False)
    three = model.decode(tokens.T, three_starts, three_caches)
    torch.testing.assert_close(one[0], three[:, 0], rtol=1e-5, atol=1e-6)
