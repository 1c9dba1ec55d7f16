"""Each kernel against torch's operations, and the engine with all of them against the engine without.

They run in Triton's interpreter (tests/conftest.py): what they compute is tested, not what a compiler makes of it. With
TRITON_INTERPRET=0 the same tests run the kernels themselves, on a GPU.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 alone")

import triton.language as tl
from triton.runtime import interpreter

from app.engine import (
    Engine,
    EngineConfig,
    GenerationParams,
    Sequence,
    kernels,
    kv_cache,
    linear,
    model_runner,
    triton_kernels,
)
from app.engine.beam_search import BeamState, _needed, advance_beams
from app.engine.kv_cache import CacheShape, KVCache
from app.engine.linear import ACTIVATIONS, IDENTITY, DenseLinear, FewRowsLinear, Workspace
from app.engine.logits_processors import ban, completes_ngram
from app.engine.models import weights
from app.engine.models.layers import KernelLayerNorm, LayerNorm
from app.engine.slot_options import LOOK_AHEAD, WHEN_FULL, ActiveOptions, SlotOptions, Vocabulary
from app.engine.step_cache import KernelStepCache
from app.engine.top_candidates import top_candidates
from app.engine.triton_kernels import launch, network, products
from tests.tiny import TinyShape, random_sources, save, tiny_model

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)
ON_A_GPU = DEVICE.type == "cuda"  # where all cases take no time; in the interpreter they would take minutes
STEPS = [(1, 64), (4, 64), (5, 16), (16, 32), (3, 128)]  # beams and head sizes
IN_16_BITS = STEPS if ON_A_GPU else [(1, 64), (4, 64), (5, 16)]  # the last two take as long as all others
MANY = 8200 if ON_A_GPU else 520


@pytest.fixture(autouse=True)
def repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things that Triton's does not do: loops up to a loaded number with NumPy 2.4, and products in bfloat16.

    It makes numbers of arrays of one dimension, and keeps bfloat16 as integers, which it multiplies.
    """
    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


@pytest.fixture
def not_yet_asked() -> Iterator[None]:
    kernels._working.cache_clear()
    yield
    kernels._working.cache_clear()


@pytest.mark.usefixtures("not_yet_asked")
def test_they_are_found_to_work() -> None:
    assert kernels._working(DEVICE) is triton_kernels


@pytest.mark.usefixtures("not_yet_asked")
@pytest.mark.parametrize("name", ["linear", "add_norm", "cross_attention", "log_softmax"])
def test_where_one_gives_another_answer_there_are_none(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(triton_kernels, name)
    monkeypatch.setattr(triton_kernels, name, lambda *given: right(*given) * 1.1)
    assert kernels._working(DEVICE) is None
    assert "gives another answer than torch" in caplog.text


def randoms(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype is dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours.double(), expected.double(), atol=tolerance, rtol=tolerance)


def caches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, beams: int, head_size: int, seed: int
) -> tuple[KVCache, KVCache]:
    """The same content, once in the dtype for the kernels and once in fp64 for torch; 4 slots, 2 layers, 3 heads."""
    shape = CacheShape(num_layers=2, num_beams=beams, num_heads=3, head_size=head_size, max_source=160, max_target=150)
    exact = KVCache(shape, 4, DEVICE, torch.float64)
    exact._kernels = None
    monkeypatch.setattr(kv_cache, "step_kernels_for", lambda device, dtype: triton_kernels)
    ours = KVCache(shape, 4, DEVICE, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name in ("self_kv", "cross_keys", "cross_values"):
        content = torch.randn(getattr(ours, name).shape, generator=generator).to(dtype)
        getattr(ours, name).copy_(content)
        getattr(exact, name).copy_(content)
    ancestors = torch.randint(beams, ours.ancestors.shape, generator=generator)
    ours.ancestors.copy_(ancestors)
    exact.ancestors.copy_(ancestors)
    return ours, exact


@pytest.mark.parametrize(
    ("beams", "head_size", "dtype"),
    [(*step, dtype) for dtype in TOLERANCES for step in (STEPS if dtype is torch.float32 else IN_16_BITS)],
)
@torch.inference_mode()
def test_attention_of_a_step_is_what_torch_computes(
    beams: int, head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, exact = caches(monkeypatch, dtype, beams, head_size, seed=beams)
    width = 3 * head_size
    positions = torch.tensor([0, 131, 64], device=DEVICE)
    lengths = torch.tensor([1, 130, 64], device=DEVICE)
    for layer, step in ((0, 0), (1, 0), (1, 1)):  # the last finds what the one before has written
        at = positions + step
        mine = ours.begin_step(at, lengths, 140, 150, ragged=True)
        theirs = exact.begin_step(at, lengths, 140, 150, ragged=True)
        assert isinstance(mine, KernelStepCache)
        qkv = randoms(3 * beams, 3 * width, seed=2 * layer + step, dtype=dtype)
        assert_close(mine.self_attention(layer, qkv), theirs.self_attention(layer, qkv.double()), dtype)
        query = qkv[:, :width] * 0.5
        assert_close(mine.cross_attention(layer, query), theirs.cross_attention(layer, query.double()), dtype)
    assert torch.equal(ours.self_kv.double(), exact.self_kv)
    assert torch.equal(ours.ancestors, exact.ancestors)


@torch.inference_mode()
def test_what_no_beam_may_see_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, exact = caches(monkeypatch, torch.float32, beams=2, head_size=16, seed=0)
    # The slot's later positions, the other beam's, and what lies behind the source.
    ours.ancestors[0] = torch.tensor([0, 1], device=DEVICE)[:, None]
    exact.ancestors[0] = ours.ancestors[0]
    ours.self_kv[:, :, 0, :, 5:] = torch.nan
    ours.cross_keys[:, 0, :, 70:] = torch.nan
    ours.cross_values[:, 0, :, 70:] = torch.nan
    at, lengths = torch.tensor([5], device=DEVICE), torch.tensor([70], device=DEVICE)
    mine, theirs = (cache.begin_step(at, lengths, 6, 70, ragged=False) for cache in (ours, exact))
    qkv = randoms(2, 3 * 48, seed=1)
    expected = theirs.self_attention(0, qkv.double())
    assert_close(mine.self_attention(0, qkv), expected, torch.float32)
    query = qkv[:, :48].contiguous()
    assert_close(mine.cross_attention(0, query), theirs.cross_attention(0, query.double()), torch.float32)
    ours.self_kv[:, :, 0, :, :5, 1] = torch.nan
    again = ours.begin_step(at, lengths, 6, 70, ragged=False).self_attention(0, qkv)
    assert_close(again[:1], expected[:1], torch.float32)
    assert again[1].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@torch.inference_mode()
def test_what_is_no_number_stays_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = caches(monkeypatch, torch.float32, beams=2, head_size=16, seed=0)
    at, lengths = torch.tensor([3], device=DEVICE), torch.tensor([70], device=DEVICE)
    step = ours.begin_step(at, lengths, 6, 70, ragged=False)
    qkv = randoms(2, 3 * 48, seed=1)
    qkv[1, 0] = torch.nan  # a query's
    attended, crossed = step.self_attention(0, qkv), step.cross_attention(0, qkv[:, :48].contiguous())
    for found in (attended, crossed):
        assert found[1, :16].isnan().all()
        assert not found[0].isnan().any()
    normed = triton_kernels.add_norm(attended, attended, randoms(48, seed=2), randoms(48, seed=3), 1e-5)
    assert normed[1].isnan().all()
    assert not normed[0].isnan().any()
    product = triton_kernels.linear(attended, randoms(7, 48, seed=2), randoms(7, seed=3), "gelu")
    assert product[1].isnan().all()
    assert not product[0].isnan().any()


def unchanged(x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
    """A product with the identity."""
    return x if residual is None else x + residual


@DTYPES
@pytest.mark.parametrize("width", [16, 100, 768])
@torch.inference_mode()
def test_the_norm_of_a_sum(dtype: torch.dtype, width: int) -> None:
    x, residual = (randoms(5, width, seed=seed, dtype=dtype) for seed in (1, 2))
    weight, bias = (randoms(width, seed=seed, dtype=dtype) for seed in (3, 4))
    exact = LayerNorm(weight.double(), bias.double(), 1e-12)
    ours = KernelLayerNorm(weight, bias, 1e-12, triton_kernels)
    expected = exact.of_sum(unchanged, x.double(), residual.double())
    assert_close(ours.of_sum(unchanged, x, residual), expected, dtype)


@DTYPES
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "activation"),
    [
        (1, 64, 10, IDENTITY),
        (4, 768, 33, ACTIVATIONS["gelu"]),
        (7, 100, 8, ACTIVATIONS["gelu_new"]),
        (8, 48, 4, ACTIVATIONS["relu"]),
        (2, 300, MANY, IDENTITY),
        (3, 1500, 20, IDENTITY),
        (16, 1024, 40, ACTIVATIONS["gelu"]),
        (9, 16, 5, ACTIVATIONS["gelu"]),
        (17, 16, 5, ACTIVATIONS["gelu"]),
    ],
)
@torch.inference_mode()
def test_products_of_few_rows_and_of_more(
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    activation: linear.Activation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not ON_A_GPU:  # smaller, and still more than either: the largest of the other cases has 40,960 weights
        monkeypatch.setattr(products, "MANY", MANY)
        monkeypatch.setattr(products, "MAX_FP32_WEIGHTS", 100_000)
    x = randoms(rows, inputs, seed=1, dtype=dtype)
    weight = (randoms(outputs, inputs, seed=2) / inputs**0.5).to(dtype)
    bias, residual = randoms(outputs, seed=3, dtype=dtype), randoms(rows, outputs, seed=4, dtype=dtype)
    exact = DenseLinear(weight.double(), bias.double(), activation)
    ours = FewRowsLinear(weight, bias, activation, kernels=triton_kernels)
    assert_close(ours(x), exact(x.double()), dtype)
    assert_close(ours(x, residual), exact(x.double(), residual.double()), dtype)


@DTYPES
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(4, 33, 2100), (1, 48, 64), (2, 20, 1025)])
@torch.inference_mode()
def test_parts_of_a_product_add_up_to_it(dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    x, bias = randoms(rows, inputs, seed=1, dtype=dtype), randoms(outputs, seed=2, dtype=dtype)
    weight = (randoms(outputs, inputs, seed=3) / inputs**0.5).to(dtype)
    parts = FewRowsLinear(weight, bias, kernels=triton_kernels).in_parts(x)
    assert parts.shape == (-(-inputs // 1024), rows, outputs)
    expected = DenseLinear(weight.double(), bias.double())(x.double())
    assert_close(parts.double().sum(0).to(dtype), expected, dtype)
    residual, norm = randoms(rows, outputs, seed=4, dtype=dtype), randoms(outputs, seed=5, dtype=dtype)
    normed = triton_kernels.add_norm(parts, residual, norm, bias, 1e-12)
    exact = LayerNorm(norm.double(), bias.double(), 1e-12)
    assert_close(normed, exact.of_sum(unchanged, expected, residual.double()), dtype)


@torch.inference_mode()
def test_a_product_of_many_rows_is_one_part() -> None:
    x, weight, bias = randoms(20, 16, seed=1), randoms(5, 16, seed=2), randoms(5, seed=3)
    parts = FewRowsLinear(weight, bias, kernels=triton_kernels).in_parts(x)
    assert torch.equal(parts, DenseLinear(weight, bias)(x)[None])


@DTYPES
@pytest.mark.parametrize("length", [1, 64, 130, 160])
@torch.inference_mode()
def test_parts_of_a_source_make_the_whole(dtype: torch.dtype, length: int) -> None:
    """One token leaves every part but the first empty."""
    keys, values = (randoms(1, 3, 160, 64, seed=seed, dtype=dtype) for seed in (1, 2))
    query, lengths = randoms(4, 192, seed=3, dtype=dtype), torch.tensor([length], device=DEVICE)
    whole, parts = (triton_kernels.cross_attention(query, keys, values, lengths, parts) for parts in (1, 4))
    assert_close(parts, whole.double(), dtype)


@pytest.mark.parametrize(
    ("size", "room", "parts"),
    [(1, 512, 8), (2, 512, 4), (4, 512, 2), (8, 512, 1), (64, 512, 1), (1, 128, 2), (1, 40, 1)],
)
def test_sources_are_split_where_programs_are_few(size: int, room: int, parts: int) -> None:
    assert network.source_parts(size, heads=12, room=room, head_size=64) == parts


@DTYPES
@pytest.mark.parametrize("columns", [64, 4160, 8192])
@torch.inference_mode()
def test_log_probabilities_are_torchs(dtype: torch.dtype, columns: int) -> None:
    """Of a group's part of the beams too, and of rows whose last columns are no tokens."""
    logits = (randoms(2, 5, columns, seed=1) * 3).to(dtype)
    logits[..., -40:] = -torch.inf
    for part in (logits, logits[:, 1:3]):
        found = triton_kernels.log_softmax(part)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, part.float().log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("length", [1, 150])
@torch.inference_mode()
def test_a_query_that_is_no_number_has_no_answer_in_parts_either(length: int) -> None:
    keys, values, query = (randoms(*shape, seed=1) for shape in ((1, 3, 256, 64), (1, 3, 256, 64), (2, 192)))
    query[1, 0] = torch.nan
    found = triton_kernels.cross_attention(query, keys, values, torch.tensor([length], device=DEVICE), 4)
    assert found[1, :64].isnan().all()
    assert not found[1, 64:].isnan().any()
    assert not found[0].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("at", [5000, 8100])  # with numbers in its chunk, and with columns of no token alone
@torch.inference_mode()
def test_one_logit_that_is_no_number_makes_its_row_so(at: int) -> None:
    logits = randoms(1, 2, 8192, seed=1)
    logits[..., 5001:] = -torch.inf
    logits[0, 1, at] = torch.nan
    found = triton_kernels.log_softmax(logits)
    assert found[0, 1].isnan().all()
    assert not found[0, 0].isnan().any()


def scores_of(seed: int, slots: int, beams: int) -> Tensor:
    """Log-probabilities of 150 tokens; behind them are columns of none."""
    scores = randoms(slots, beams, 192, seed=seed).mul_(2)
    scores[..., 2] += 3  # the end token
    scores[..., 150:] = -torch.inf
    return scores


@pytest.mark.parametrize(("beams", "k"), [(1, 2), (4, 8), (5, 10)])
def test_candidates_are_chosen_as_torch_chooses_them(beams: int, k: int) -> None:
    scores, beam_scores = scores_of(beams, 3, beams), randoms(3, beams, seed=9)
    expected = top_candidates(scores, beam_scores, k, 150)
    ours = triton_kernels.top_candidates(scores, beam_scores, k, 150)
    for field in ("scores", "token_logprobs", "rows", "tokens"):
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's NumPy
def test_candidates_that_cannot_be_are_tokens_and_beams_all_the_same() -> None:
    scores = torch.full((2, 4, 192), -torch.inf, device=DEVICE)
    scores[:, :, 7] = 0.0
    scores[1, 2] = torch.nan
    ours = triton_kernels.top_candidates(scores, torch.zeros(2, 4, device=DEVICE), 8, 150)
    for chosen, rows in ((ours.tokens, 150), (ours.rows, 4)):
        assert ((chosen >= 0) & (chosen < rows)).all()
    assert len(set(zip(ours.rows[0].tolist(), ours.tokens[0].tolist(), strict=True))) == 8
    assert sorted(ours.rows[0, :4].tolist()) == [0, 1, 2, 3]
    assert ours.tokens[0, :4].tolist() == [7] * 4


@pytest.mark.parametrize("width", [1, 33])
def test_ngrams_are_banned_as_torch_bans_them(width: int) -> None:
    said = torch.randint(4, (4, 3, 70), generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, :, :width]
    lengths = torch.tensor([20, 3, 33, 33], device=DEVICE).clamp(max=width)
    sizes = torch.tensor([2, 0, 3, 1], device=DEVICE)
    expected = scores_of(1, 4, 3)
    ours = expected.clone()
    ban(expected, said, completes_ngram(said, lengths, said, lengths, sizes, 3))
    triton_kernels.ban_ngrams(ours, said, lengths, sizes)
    assert torch.equal(ours[..., :-1], expected[..., :-1])
    assert (ours[..., :150] == -torch.inf).any()


@pytest.mark.parametrize("seed", range(12))
def test_beams_advance_as_they_do_in_torch(seed: int) -> None:
    rng = random.Random(seed)
    beams, room = rng.choice([2, 3, 4, 8]), rng.choice([9, 80])
    theirs = BeamState.empty(5, beams, room, DEVICE)
    options = SlotOptions.empty(5, 10, room, DEVICE)
    for slot in range(3):
        theirs.start(slice(slot, slot + 1), 1)
        options.max_new_tokens[slot] = rng.choice([3, room - 1])
        options.early_stopping[slot] = rng.choice([0, WHEN_FULL, LOOK_AHEAD])
        options.no_repeat_ngram_size[slot] = rng.choice([0, 2])
        penalty = rng.choice([1.0, 0.0, 2.0, -1.0])
        options.length_divisors[slot] = torch.arange(room).clamp(min=1).float() ** penalty
    ours, vocabulary = copy.deepcopy(theirs), Vocabulary(150, 1, 2)
    for step in range(5):
        active = ActiveOptions(target=step + 1, source=1, ragged=False, largest_ngram=min(step + 2, 2))
        scores = scores_of(100 * seed + step, 3, beams)
        results = [
            advance_beams(
                state.window(3, step + 2), scores.clone(), options.first(3), active, vocabulary, kernels=kernels
            )
            for state, kernels in ((theirs, None), (ours, triton_kernels))
        ]
        assert torch.equal(results[0].done, results[1].done)
        assert torch.equal(_needed(results[0].parents), _needed(results[1].parents))
        for field in fields(BeamState):
            found, expected = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name in ("finished_seqs", "finished_token_logprobs", "finished_lengths"):  # others mean nothing
                found, expected = found[theirs.is_finished], expected[theirs.is_finished]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_an_engine_of_kernels_says_what_one_of_torch_says(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ON_A_GPU:  # the interpreter takes its time by programs: few of them
        small = products.tile_for
        monkeypatch.setattr(products, "tile_for", lambda *sizes: small(*sizes)._replace(outputs=64, inputs=64))
    folder = save(tiny_model(seed=3, shape=TinyShape(vocab=130, hidden=32, layers=1, decoder=decoder)), tmp_path)
    params = [
        GenerationParams(num_beams=3, num_return_sequences=3, max_new_tokens=4, no_repeat_ngram_size=2),
        GenerationParams(max_new_tokens=3),
        GenerationParams(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, max_new_tokens=3),
        GenerationParams(num_beams=3, num_beam_groups=3, diversity_penalty=0.5, max_new_tokens=3),
        GenerationParams(num_beams=2, do_sample=True, seed=7, max_new_tokens=3),
    ]

    def said() -> list[list[tuple[int, ...]]]:
        engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=4, device=DEVICE.type))
        texts = random_sources(5, seed=2, longest=12)
        sequences = [Sequence(tuple(ids), params[i % len(params)]) for i, ids in enumerate(texts)]
        for sequence in sequences:
            engine.add(sequence)
        while engine.scheduler.has_work:
            engine.step()
        outputs = [sequence.output for sequence in sequences]
        return [[h.token_ids for h in output.hypotheses] for output in outputs if output is not None]

    for used in (None, triton_kernels):
        for module in (linear, weights):
            monkeypatch.setattr(module, "kernels_for", lambda device, used=used: used)
        for module in (kv_cache, model_runner):
            monkeypatch.setattr(module, "step_kernels_for", lambda device, dtype, used=used: used)
        if used is None:
            expected = said()
    assert len(expected) == 5
    assert said() == expected


@pytest.mark.skipif(not ON_A_GPU, reason="the interpreter computes in fp32 whatever the dtype, and takes minutes")
@DTYPES
def test_the_starts_check_passes_in_every_dtype(dtype: torch.dtype) -> None:
    for _ in range(20):  # what overlaps may differ from run to run
        kernels.check(triton_kernels, DEVICE, dtype)


@pytest.mark.skipif(
    not ON_A_GPU or torch.cuda.get_device_capability() < (9, 0), reason="launches overlap on GPUs like an H100 alone"
)
@DTYPES
def test_launches_that_overlap_change_no_bit(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model wide and deep enough for every kernel, its steps recorded as graphs."""
    shape = TinyShape(
        vocab=9000, hidden=512, layers=6, heads=8, encoder_hidden=512, encoder_heads=8, positions=512, eos_bias=-1.0
    )
    folder = save(tiny_model(seed=5, shape=shape), tmp_path)
    params = GenerationParams(num_beams=4, num_return_sequences=4, max_new_tokens=40, no_repeat_ngram_size=3)

    def said(size: int) -> list[list[tuple[tuple[int, ...], float]]]:
        config = EngineConfig(max_num_seqs=size, device=DEVICE.type, dtype=str(dtype).removeprefix("torch."))
        engine = Engine.from_folder(folder, config)
        sequences = [Sequence(tuple(ids), params) for ids in random_sources(12, seed=4, longest=400)]
        for sequence in sequences:
            engine.add(sequence)
        while engine.scheduler.has_work:
            engine.step()
        outputs = [sequence.output for sequence in sequences]
        return [[(h.token_ids, h.score) for h in output.hypotheses] for output in outputs if output is not None]

    for size in (1, 4, 16):
        found = []
        for overlapping in (True, False, True):
            monkeypatch.setattr(launch, "overlapping", overlapping)
            found.append(said(size))
        assert len(found[0]) == 12
        assert found[0] == found[1] == found[2]
