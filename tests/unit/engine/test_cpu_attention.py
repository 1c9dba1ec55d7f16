"""Attention in C against torch's operations in fp64, of steps and of sources, with vectors of both lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.engine import cpu_kernels
from app.engine.attention import attend_sources
from app.engine.kv_cache import CacheShape, KVCache
from app.engine.step_cache import KernelStepCache, TorchStepCache
from tests.cpu_builds import assert_close, lanes, needs_kernels, randoms

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

CPU = torch.device("cpu")
STEPS = [(1, 8), (2, 1), (3, 16), (4, 4), (4, 8), (5, 2), (6, 9), (9, 5), (16, 3)]  # beams, and vectors of a head


def caches(beams: int, head_size: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[KVCache, KVCache]:
    """The same content, in `dtype` for the kernels and in fp64 for torch; 4 slots, 2 layers, 3 heads."""
    shape = CacheShape(num_layers=2, num_beams=beams, num_heads=3, head_size=head_size, max_source=160, max_target=150)
    ours, exact = KVCache(shape, 4, CPU, dtype, torch.float32), KVCache(shape, 4, CPU, torch.float64)
    for index, name in enumerate(("self_kv", "cross_keys", "cross_values")):
        getattr(exact, name).copy_(getattr(ours, name).copy_(randoms(*getattr(ours, name).shape, seed=seed + index)))
    ancestors = torch.randint(beams, ours.ancestors.shape, generator=torch.Generator().manual_seed(seed))
    ours.ancestors.copy_(ancestors)
    exact.ancestors.copy_(ancestors)
    return ours, exact


@pytest.mark.parametrize(("beams", "vectors"), STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_attention_of_a_step_is_what_torch_computes(beams: int, vectors: int, dtype: torch.dtype) -> None:
    """With caches in bf16 of what is in them: this step's keys and values, too, are read as they were rounded."""
    head_size = vectors * lanes()
    ours, exact = caches(beams, head_size, seed=beams, dtype=dtype)
    width = 3 * head_size
    positions, lengths = torch.tensor([0, 148, 64]), torch.tensor([1, 160, 64])  # as many as there is room for
    for layer, step in ((0, 0), (1, 0), (1, 1)):  # the last finds what the one before has written
        at = positions + step
        mine = ours.begin_step(at, lengths, 150, 160, ragged=True)
        theirs = exact.begin_step(at, lengths, 150, 160, ragged=True)
        assert isinstance(mine, KernelStepCache)
        assert isinstance(theirs, TorchStepCache)
        qkv = randoms(3 * beams, 3 * width, seed=2 * layer + step) / head_size**0.25
        rounded = torch.cat([qkv[:, :width], qkv[:, width:].to(dtype).float()], 1)
        assert_close(mine.self_attention(layer, qkv), theirs.self_attention(layer, rounded.double()))
        query = qkv[:, :width] * 0.5
        assert_close(mine.cross_attention(layer, query), theirs.cross_attention(layer, query.double()))
    assert torch.equal(ours.self_kv.double(), exact.self_kv)
    assert torch.equal(ours.ancestors, exact.ancestors)


@pytest.mark.parametrize("beams", [1, 2, 4])
@torch.inference_mode()
def test_attention_over_as_many_keys_as_there_is_room_for(beams: int) -> None:
    size = lanes()
    keys, values = randoms(1, 1, 4096, size, seed=1), randoms(1, 1, 4096, size, seed=2)
    query, length = randoms(beams, size, seed=3), torch.tensor([4096])
    weights = (query.double() @ keys[0, 0].double().T).softmax(-1)
    assert_close(cpu_kernels.cross_attention(query, keys, values, length), weights @ values[0, 0].double())
    own_keys, own_values = (randoms(1, 1, 4096, beams, size, seed=4 + i) for i in range(2))
    ancestors, qkv = torch.zeros(1, beams, 4096, dtype=torch.long), randoms(beams, 3 * size, seed=6)
    attended = cpu_kernels.self_attention(qkv, own_keys, own_values, ancestors, length - 1)
    for beam in range(beams):
        of_beam = torch.stack([own_keys, own_values])[:, 0, 0, :, 0].double()
        of_beam[:, -1] = torch.stack([own_keys, own_values])[:, 0, 0, -1, beam]
        weights = (qkv[beam, :size].double() @ of_beam[0].T).softmax(-1)
        assert_close(attended[beam], weights @ of_beam[1])


@torch.inference_mode()
def test_attention_of_a_sequence_does_not_depend_on_the_others() -> None:
    """To the last bit, with more threads than cores and with one."""
    ours, _ = caches(4, 64, seed=1)
    positions, lengths = torch.tensor([7, 131, 64]), torch.tensor([33, 130, 64])
    qkv, threads = randoms(12, 576, seed=5), torch.get_num_threads()
    together = ours.begin_step(positions, lengths, 140, 150, ragged=True)
    expected = torch.cat([together.self_attention(0, qkv), together.cross_attention(0, qkv[:, :192])], 1)
    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            first = ours.begin_step(positions[:1], lengths[:1], 8, 33, ragged=False)
            alone = [first.self_attention(0, qkv[:4]), first.cross_attention(0, qkv[:4, :192])]
            assert torch.equal(torch.cat(alone, 1), expected[:4])
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def test_a_score_far_below_the_greatest_weighs_nothing_and_one_far_above_everything() -> None:
    keys = torch.zeros(1, 1, 13, lanes())
    keys[0, 0, 5, 0], keys[0, 0, 9, 0] = 3e4, -3e4
    query = torch.zeros(1, lanes())
    query[0, 0] = 1.0
    values = randoms(1, 1, 13, lanes(), seed=1)
    assert torch.equal(cpu_kernels.cross_attention(query, keys, values, torch.tensor([13])), values[0, :, 5])


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@torch.inference_mode()
def test_what_is_no_number_stays_with_its_sequence(number: float) -> None:
    """A query that is none, in one of two sequences and in one of its beams; then a value."""
    keys, values = randoms(2, 3, 40, 64, seed=1), randoms(2, 3, 40, 64, seed=2)
    query, lengths = randoms(8, 192, seed=3), torch.tensor([40, 21])
    query[5, :64] = number
    attended = cpu_kernels.cross_attention(query, keys, values, lengths)
    finite = attended.view(8, 3, 64).isfinite().all(-1)
    assert not attended.view(8, 3, 64)[5, 0].isfinite().any()
    assert [index for index in range(24) if not finite.flatten()[index]] == [5 * 3]
    query[5] = 1.0
    values[1, 2, 20, 7], values[1, 2, 21, 8] = number, number  # the last token, and one behind it that nobody reads
    attended = cpu_kernels.cross_attention(query, keys, values, lengths).view(8, 3, 64)
    assert not attended[4:, 2, 7].isfinite().any()
    assert attended.isfinite().sum() == attended.numel() - 4


@pytest.mark.parametrize(("heads", "vectors"), [(1, 1), (3, 3), (2, 4), (2, 8), (1, 17)])
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_attention_of_sources_is_what_torch_computes(heads: int, vectors: int) -> None:
    head_size = vectors * lanes()
    lengths = [1, 15, 16, 17, 24, 25, 47, 48, 49, 0, 255, 257, 512, 600]
    qkv = randoms(sum(lengths), 3, heads, head_size, seed=head_size) / head_size**0.25
    exact = attend_sources(qkv.double(), [n for n in lengths if n])
    assert_close(cpu_kernels.source_attention(qkv, lengths), exact)
    assert_close(attend_sources(qkv, lengths, kernels=cpu_kernels), exact)


@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_attention_of_a_source_does_not_depend_on_the_others() -> None:
    """To the last bit."""
    lengths = [33, 257, 1, 120]
    qkv = randoms(sum(lengths), 3, 3, 32, seed=1)
    together = torch.split(cpu_kernels.source_attention(qkv, lengths), lengths)
    for own, length, expected in zip(torch.split(qkv, lengths), lengths, together, strict=True):
        assert torch.equal(cpu_kernels.source_attention(own, [length]), expected)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@torch.inference_mode()
def test_what_is_no_number_stays_with_its_source(part: int, number: float) -> None:
    lengths = [30, 61, 8]
    qkv = randoms(sum(lengths), 3, 2, 32, seed=1).abs()
    qkv[75, part, 1, 5] = number  # the second source's token 45
    finite = cpu_kernels.source_attention(qkv, lengths).view(-1, 2, 32).isfinite()
    assert finite[:30].all()
    assert finite[91:].all()
    assert finite[:, 0].all()
    touched = finite[30:91, 1]
    if part == 0:
        assert not touched[45].any()
        assert touched[:45].all()
        assert touched[46:].all()
    elif part == 2:
        assert not touched[:, 5].any()
        assert touched[:, :5].all()
    elif number != -torch.inf:  # every score of such a key is no number, or above all others
        assert not touched.any()


@torch.inference_mode()
def test_in_a_source_too_a_score_far_below_the_greatest_weighs_nothing() -> None:
    qkv = torch.zeros(50, 3, 1, lanes())
    qkv[:, 0, 0, 0], qkv[20, 1, 0, 0], qkv[30, 1, 0, 0] = 1.0, 3e4, -3e4
    qkv[:, 2] = randoms(50, 1, lanes(), seed=1)
    assert torch.equal(cpu_kernels.source_attention(qkv, [50]), qkv[20, 2].expand(50, -1))


@torch.inference_mode()
def test_attention_refuses_what_does_not_fit_before_memory_is_read() -> None:
    size = lanes()
    keys, own = randoms(2, 3, 16, size, seed=1), randoms(2, 3, 16, 4, size, seed=1)
    query, qkv, lengths = randoms(8, 3 * size, seed=2), randoms(8, 9 * size, seed=3), torch.tensor([8, 9])
    ancestors = torch.zeros(2, 4, 16, dtype=torch.long)
    of_12 = randoms(2, 3, 16, 12, seed=1)
    refused: dict[str, Callable[[], Tensor]] = {
        "query is": lambda: cpu_kernels.cross_attention(query[:, : 2 * size], keys, keys, lengths),
        "query": lambda: cpu_kernels.cross_attention(query[:7], keys, keys, lengths),
        "values": lambda: cpu_kernels.cross_attention(query, keys, keys[:, :, :8], lengths),
        "at most 2 fit": lambda: cpu_kernels.cross_attention(query[:6], keys, keys, torch.tensor([1, 2, 3])),
        "heads of 12": lambda: cpu_kernels.cross_attention(randoms(8, 36, seed=1), of_12, of_12, lengths),
        "as it lies in C": lambda: cpu_kernels.cross_attention(query, keys, keys[:, [0]].expand_as(keys), lengths),
        "not torch.bfloat16": lambda: cpu_kernels.cross_attention(query, keys.bfloat16(), keys, lengths),
        "keys is torch.float16": lambda: cpu_kernels.cross_attention(query, keys.half(), keys.half(), lengths),
        "not torch.int64": lambda: cpu_kernels.cross_attention(query, keys, keys, lengths.int()),
        "qkv": lambda: cpu_kernels.self_attention(query, own, own, ancestors, lengths),
        "ancestors": lambda: cpu_kernels.self_attention(qkv, own, own, ancestors[:, :, :9].contiguous(), lengths),
        "qkv is": lambda: cpu_kernels.source_attention(qkv.view(8, 3, 3, size), [4, 5]),
        "sources of": lambda: cpu_kernels.source_attention(qkv.view(8, 3, 3, size), [9, -1]),
        "heads of 6": lambda: cpu_kernels.source_attention(randoms(8, 3, 4, 6, seed=1), [8]),
        "float64": lambda: cpu_kernels.source_attention(qkv.view(8, 3, 3, size).double(), [8]),
    }
    for name, wrong in refused.items():
        with pytest.raises(ValueError, match=name):
            wrong()


def test_heads_of_other_sizes_and_more_keys_are_torchs() -> None:
    """And a model that takes long sources has kernels while they are short."""
    for head_size, source, fits in ((64, 512, True), (12, 512, False), (64, 4096, True), (64, 4097, False)):
        cache = KVCache(CacheShape(1, 1, 1, head_size, 8192, 8), 1, CPU, torch.float32)
        step = cache.begin_step(torch.tensor([0]), torch.tensor([source]), 1, source, ragged=False)
        assert isinstance(step, KernelStepCache if fits else TorchStepCache)


@torch.inference_mode()
def test_what_is_kept_in_bf16_is_rounded_as_torch_rounds() -> None:
    """To the nearest, of two to the even one; what is too large and what is no number, too."""
    size = lanes()
    bits = torch.randint(-(2**31), 2**31, (4, 3 * size), generator=torch.Generator().manual_seed(1)).int()
    bits[0] = bits[0] // 2**16 * 2**16 + 2**15  # halfway between two
    bits[1, size:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -0.0, 1e-40, 0.0, 1.0] * (size // 4)).view(
        torch.int32
    )
    qkv = bits.view(torch.float32)
    keys, values = (torch.zeros(1, 1, 1, 4, size, dtype=torch.bfloat16) for _ in range(2))
    cpu_kernels.self_attention(qkv, keys, values, torch.zeros(1, 4, 1, dtype=torch.long), torch.tensor([0]))
    for kept, given in ((keys, qkv[:, size : 2 * size]), (values, qkv[:, 2 * size :])):
        expected = given.bfloat16()
        assert torch.equal(kept.view(4, size).isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(kept.view(4, size).view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
