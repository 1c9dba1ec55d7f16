"""Each kernel in C against torch's operations in fp64, and the engine with all of them against the engine without."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import machinery
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine import Engine, EngineConfig, GenerationParams, Sequence, checkpoint, cpu_kernels, kernels
from app.engine.attention import attend_sources
from app.engine.cpu_kernels import choice, compiled
from app.engine.kv_cache import CacheShape, KVCache
from app.engine.linear import PanelLinear
from app.engine.models.bert_decoder import BertDecoder
from app.engine.models.gpt2_decoder import Gpt2Decoder
from app.engine.step_cache import KernelStepCache, TorchStepCache
from tests.recorder import Recorder
from tests.tiny import TinyShape, random_sources, save, tiny_model

CPU = torch.device("cpu")
STEPS = [(1, 64), (2, 8), (3, 128), (4, 32), (4, 64), (5, 16), (6, 72), (9, 40), (16, 24)]  # beams and head sizes


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where they were measured to be faster."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """More than there are cores for tests, too: who does what must not matter."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def not_yet_asked() -> Iterator[None]:
    kernels.cpu_kernels.cache_clear()
    compiled.library.cache_clear()
    yield
    kernels.cpu_kernels.cache_clear()
    compiled.library.cache_clear()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="without gcc there is nothing to find")
def test_where_there_is_a_compiler_they_are_compiled() -> None:
    """pip does not say when an optional extension is left out: a mistake in the C would pass as a slow engine."""
    folder = Path(cpu_kernels.__file__).parent
    assert [path for suffix in machinery.EXTENSION_SUFFIXES for path in folder.glob(f"_compiled*{suffix}")]


pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    or (shutil.which("gcc") is None and find_spec("app.engine.cpu_kernels._compiled") is None),
    reason="they are for x86 with AVX2, and gcc compiles them when the package is installed",
)


def randoms(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=5e-6, rtol=5e-6)


@pytest.mark.usefixtures("not_yet_asked")
def test_they_are_found_to_work() -> None:
    assert kernels.step_kernels_for(CPU, torch.float32) is cpu_kernels


@pytest.mark.usefixtures("not_yet_asked")
@pytest.mark.parametrize(
    "name", ["multiply", "multiply_int8", "cross_attention", "self_attention", "source_attention", "log_softmax"]
)
def test_where_one_gives_another_answer_there_are_none(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(cpu_kernels, name)
    monkeypatch.setattr(cpu_kernels, name, lambda *given, **named: right(*given, **named) * 1.1)
    assert kernels.step_kernels_for(CPU, torch.float32) is None
    assert "gives another answer than torch" in caplog.text


@pytest.mark.usefixtures("not_yet_asked")
@pytest.mark.parametrize(
    ("name", "said"),
    [("top_candidates", "others than torch's"), ("ban_ngrams", "n-grams are banned"), ("keep", "beams are kept")],
)
def test_where_one_chooses_otherwise_there_are_none(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*given: Any) -> Any:
        if name == "ban_ngrams":
            return None
        found = getattr(choice, name)(*given)
        return replace(found, tokens=found.tokens.flip(1)) if name == "top_candidates" else (found[0], found[1].flip(1))

    monkeypatch.setattr(cpu_kernels, name, wrong)
    assert kernels.cpu_kernels() is None
    assert said in caplog.text


@pytest.mark.usefixtures("not_yet_asked")
@pytest.mark.parametrize(
    ("module", "name", "instead", "said"),
    [
        (compiled, "find_spec", lambda name: None, "is not compiled"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT", "needs an x86 processor with AVX2"),
    ],
)
def test_where_they_cannot_be_loaded_the_log_says_why(
    module: object,
    name: str,
    instead: object,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, name, instead)
    assert kernels.cpu_kernels() is None
    assert kernels.cpu_kernels() is None
    (record,) = caplog.records
    assert "a decode step is made of torch's operations alone" in record.getMessage()
    assert said in record.getMessage()


def caches(beams: int, head_size: int, seed: int) -> tuple[KVCache, KVCache]:
    """The same content, in fp32 for the kernels and in fp64 for torch; 4 slots, 2 layers, 3 heads."""
    shape = CacheShape(num_layers=2, num_beams=beams, num_heads=3, head_size=head_size, max_source=160, max_target=150)
    ours, exact = (KVCache(shape, 4, CPU, dtype) for dtype in (torch.float32, torch.float64))
    for index, name in enumerate(("self_kv", "cross_keys", "cross_values")):
        getattr(exact, name).copy_(getattr(ours, name).copy_(randoms(*getattr(ours, name).shape, seed=seed + index)))
    ancestors = torch.randint(beams, ours.ancestors.shape, generator=torch.Generator().manual_seed(seed))
    ours.ancestors.copy_(ancestors)
    exact.ancestors.copy_(ancestors)
    return ours, exact


@pytest.mark.parametrize(("beams", "head_size"), STEPS)
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_attention_of_a_step_is_what_torch_computes(beams: int, head_size: int) -> None:
    ours, exact = caches(beams, head_size, seed=beams)
    width = 3 * head_size
    positions, lengths = torch.tensor([0, 148, 64]), torch.tensor([1, 160, 64])  # as many as there is room for
    for layer, step in ((0, 0), (1, 0), (1, 1)):  # the last finds what the one before has written
        at = positions + step
        mine = ours.begin_step(at, lengths, 150, 160, ragged=True)
        theirs = exact.begin_step(at, lengths, 150, 160, ragged=True)
        assert isinstance(mine, KernelStepCache)
        assert isinstance(theirs, TorchStepCache)
        qkv = randoms(3 * beams, 3 * width, seed=2 * layer + step) / head_size**0.25
        assert_close(mine.self_attention(layer, qkv), theirs.self_attention(layer, qkv.double()))
        query = qkv[:, :width] * 0.5
        assert_close(mine.cross_attention(layer, query), theirs.cross_attention(layer, query.double()))
    assert torch.equal(ours.self_kv.double(), exact.self_kv)
    assert torch.equal(ours.ancestors, exact.ancestors)


@pytest.mark.parametrize("beams", [1, 2, 4])
@torch.inference_mode()
def test_attention_over_as_many_keys_as_there_is_room_for(beams: int) -> None:
    keys, values = randoms(1, 1, 4096, 8, seed=1), randoms(1, 1, 4096, 8, seed=2)
    query, length = randoms(beams, 8, seed=3), torch.tensor([4096])
    weights = (query.double() @ keys[0, 0].double().T).softmax(-1)
    assert_close(cpu_kernels.cross_attention(query, keys, values, length), weights @ values[0, 0].double())
    own_keys, own_values = (randoms(1, 1, 4096, beams, 8, seed=4 + i) for i in range(2))
    ancestors, qkv = torch.zeros(1, beams, 4096, dtype=torch.long), randoms(beams, 24, seed=6)
    attended = cpu_kernels.self_attention(qkv, own_keys, own_values, ancestors, length - 1)
    for beam in range(beams):
        of_beam = torch.stack([own_keys, own_values])[:, 0, 0, :, 0].double()
        of_beam[:, -1] = torch.stack([own_keys, own_values])[:, 0, 0, -1, beam]
        weights = (qkv[beam, :8].double() @ of_beam[0].T).softmax(-1)
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
    keys = torch.zeros(1, 1, 13, 8)
    keys[0, 0, 5, 0], keys[0, 0, 9, 0] = 3e4, -3e4
    query = torch.zeros(1, 8)
    query[0, 0] = 1.0
    values = randoms(1, 1, 13, 8, seed=1)
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


@pytest.mark.parametrize(("heads", "head_size"), [(1, 8), (3, 24), (2, 32), (2, 64), (1, 136)])
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_attention_of_sources_is_what_torch_computes(heads: int, head_size: int) -> None:
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
    qkv = torch.zeros(50, 3, 1, 8)
    qkv[:, 0, 0, 0], qkv[20, 1, 0, 0], qkv[30, 1, 0, 0] = 1.0, 3e4, -3e4
    qkv[:, 2] = randoms(50, 1, 8, seed=1)
    assert torch.equal(cpu_kernels.source_attention(qkv, [50]), qkv[20, 2].expand(50, 8))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 127, 250])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@torch.inference_mode()
def test_a_product_is_what_torch_computes(rows: int, dtype: torch.dtype) -> None:
    for outputs, inputs in ((16, 1), (48, 255), (64, 513), (144, 768)):
        weight = randoms(outputs, inputs, seed=outputs) / inputs**0.5
        weight = weight.half().float() if dtype is torch.float16 else weight
        x, bias, residual = randoms(rows, inputs, seed=1), randoms(outputs, seed=2), randoms(rows, outputs, seed=3)
        panels = cpu_kernels.pack(weight, dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert_close(cpu_kernels.multiply(x, panels, bias), exact)
        assert_close(cpu_kernels.multiply(x, panels, bias, residual), exact + residual.double())
        exact[:, :9] *= 0.3
        assert_close(cpu_kernels.multiply(x, panels, bias, scale=0.3, scaled=9, gelu=True), F.gelu(exact))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("outputs", [80, 16 * 40])  # units of work one by one, and four at a time
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_a_row_of_a_product_does_not_depend_on_the_others(outputs: int, dtype: torch.dtype) -> None:
    """To the last bit: every way to group rows adds in the same order."""
    panels, bias = cpu_kernels.pack(randoms(outputs, 700, seed=1), dtype), randoms(outputs, seed=2)
    x = randoms(251, 700, seed=3)
    expected = cpu_kernels.multiply(x, panels, bias, gelu=True)
    for count in (*range(1, 14), 128, 129, 250):
        assert torch.equal(cpu_kernels.multiply(x[:count], panels, bias, gelu=True), expected[:count])
        assert torch.equal(cpu_kernels.multiply(x[-count:], panels, bias, gelu=True), expected[-count:])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 121, 250])
@torch.inference_mode()
def test_a_product_in_8_bits_is_that_of_the_rounded_weights(rows: int) -> None:
    """Inputs keep 13 bits at least: each is off by half of one of 4,095 parts of its row's largest."""
    for outputs, inputs in ((16, 2), (32, 8), (48, 254), (64, 514), (144, 3072)):
        weight, x = randoms(outputs, inputs, seed=outputs), randoms(rows, inputs, seed=1)
        bias, residual = randoms(outputs, seed=2), randoms(rows, outputs, seed=3)
        panels, scales = cpu_kernels.pack_int8(weight)
        assert (scales == weight.abs().amax(1) / 127).all()
        rounded = (weight / scales[:, None]).round().double() * scales[:, None].double()
        exact = F.linear(x.double(), rounded, bias.double())
        off = x.abs().amax(1, keepdim=True).double() / 4095 / 2 * rounded.abs().sum(1) + 1e-5 * exact.abs().max()
        for product, expected in (
            (cpu_kernels.multiply_int8(x, panels, scales, bias), exact),
            (cpu_kernels.multiply_int8(x, panels, scales, bias, residual), exact + residual.double()),
            (cpu_kernels.multiply_int8(x, panels, scales, bias, gelu=True), F.gelu(exact)),
        ):
            assert ((product.double() - expected).abs() <= 1.13 * off).all()  # as steep as a GELU is


@torch.inference_mode()
def test_in_8_bits_a_row_that_is_next_to_nothing_or_no_number_stays_so() -> None:
    panels, scales = cpu_kernels.pack_int8(randoms(32, 600, seed=1))
    x, bias = randoms(9, 600, seed=2), randoms(32, seed=3)
    x[0], x[1], x[2] = 0.0, x[1] * 1e-36, x[2] * 1e-20
    x[3, 5], x[4, 597], x[5, 0] = torch.nan, torch.inf, -torch.inf
    out = cpu_kernels.multiply_int8(x, panels, scales, bias)
    assert torch.equal(out[0], bias)
    torch.testing.assert_close(out[1:3], bias.expand(2, -1))
    assert out[3:6].isnan().all()
    assert out[6:].isfinite().all()


@torch.inference_mode()
def test_in_8_bits_the_largest_sums_are_exact() -> None:
    """Of numbers that are held exactly; one that is larger by chance must not turn the sign of 32 bits."""
    for inputs in (2, 512, 3072, 16384):
        for sign in (1.0, -1.0):
            panels, scales = cpu_kernels.pack_int8(torch.full((16, inputs), sign))
            product = cpu_kernels.multiply_int8(torch.ones(7, inputs), panels, scales, torch.zeros(16))
            torch.testing.assert_close(product, torch.full((7, 16), sign * inputs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("outputs", [80, 16 * 40])
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_a_row_of_a_product_in_8_bits_does_not_depend_on_the_others(outputs: int) -> None:
    panels, scales = cpu_kernels.pack_int8(randoms(outputs, 700, seed=1))
    x, bias = randoms(251, 700, seed=3) * 10.0 ** (torch.arange(251) % 5 - 2)[:, None], randoms(outputs, seed=2)
    expected = cpu_kernels.multiply_int8(x, panels, scales, bias, gelu=True)
    for count in (*range(1, 12), 128, 129, 250):
        assert torch.equal(cpu_kernels.multiply_int8(x[:count], panels, scales, bias, gelu=True), expected[:count])
        assert torch.equal(cpu_kernels.multiply_int8(x[-count:], panels, scales, bias, gelu=True), expected[-count:])


@torch.inference_mode()
def test_products_of_no_rows_and_of_more_dimensions_have_their_shape() -> None:
    panels, bias = cpu_kernels.pack(randoms(32, 24, seed=1), torch.float32), randoms(32, seed=2)
    assert cpu_kernels.multiply(torch.empty(0, 24), panels, bias).shape == (0, 32)
    x = randoms(2, 3, 24, seed=3)
    assert torch.equal(
        cpu_kernels.multiply(x, panels, bias).flatten(0, 1), cpu_kernels.multiply(x[:].flatten(0, 1), panels, bias)
    )


@torch.inference_mode()
def test_a_gelu_is_within_four_units_in_the_last_place_of_its_input() -> None:
    """As torch's is. Over all that matters, and where nothing does."""
    x = torch.cat([torch.linspace(-12, 12, 48001), torch.tensor([1e-30, -1e-30, 0.0, 1e30, 3e38, -1e30, -3e38])])
    identity = cpu_kernels.pack(torch.ones(16, 1), torch.float32)
    found = cpu_kernels.multiply(x[:, None], identity, torch.zeros(16), gelu=True)[:, 0].double()
    exact = F.gelu(x.double())
    assert ((found - exact).abs() <= 4 * 2.0**-24 * x.double().abs()).all()
    assert torch.equal(found[-5:], exact[-5:])
    rest = cpu_kernels.multiply(torch.tensor([[torch.inf], [torch.nan]]), identity, torch.zeros(16), gelu=True)
    assert rest[0, 0] == torch.inf
    assert rest[1].isnan().all()


@torch.inference_mode()
def test_a_residual_that_lies_otherwise_is_held_while_it_is_read() -> None:
    """Of 3 MiB: what is copied for it goes back to the system as soon as nobody holds it."""
    x, bias, residual = randoms(1024, 16, seed=1), torch.zeros(768), randoms(768, 1024, seed=2).T
    weight = randoms(768, 16, seed=3).half().float()
    expected = F.linear(x, weight) + residual
    product = cpu_kernels.multiply(x, cpu_kernels.pack(weight, torch.float16), bias, residual)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        cpu_kernels.multiply_int8(x, *cpu_kernels.pack_int8(weight), bias, residual), expected, rtol=0.1, atol=0.3
    )


@torch.inference_mode()
def test_room_is_of_its_own_dtype_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        product = cpu_kernels.multiply_int8(
            torch.ones(300, 64, dtype=torch.float32),
            *cpu_kernels.pack_int8(torch.ones(16, 64, dtype=torch.float32)),
            torch.zeros(16, dtype=torch.float32),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(product, torch.full((300, 16), 64.0))


@torch.inference_mode()
def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    x, bias, weight = randoms(5, 24, seed=3), randoms(32, seed=2), randoms(32, 24, seed=1)
    panels, int8 = cpu_kernels.pack(weight, torch.float32), cpu_kernels.pack_int8(weight)
    refused: dict[str, Callable[[], Tensor]] = {
        "x": lambda: cpu_kernels.multiply(x[:, :23], panels, bias),
        "bias": lambda: cpu_kernels.multiply(x, panels, bias[:31]),
        "panels": lambda: cpu_kernels.multiply(x, panels[..., :8], bias),
        "residual": lambda: cpu_kernels.multiply(x, panels, bias, randoms(4, 32, seed=4)),
        "x is": lambda: cpu_kernels.multiply_int8(x[:, :23], *int8, bias),
        "weight_scales": lambda: cpu_kernels.multiply_int8(x, int8[0], int8[1][:16], bias),
        "not torch.float32": lambda: cpu_kernels.multiply(x.double(), panels, bias),
        "not torch.int8": lambda: cpu_kernels.multiply_int8(x, int8[0].to(torch.int16), int8[1], bias),
        "as it lies in C": lambda: cpu_kernels.multiply(x, panels.transpose(1, 2).contiguous().transpose(1, 2), bias),
    }
    for name, wrong in refused.items():
        with pytest.raises(ValueError, match=name):
            wrong()


@torch.inference_mode()
def test_attention_refuses_what_does_not_fit_before_memory_is_read() -> None:
    keys, own = randoms(2, 3, 16, 8, seed=1), randoms(2, 3, 16, 4, 8, seed=1)
    query, qkv, lengths = randoms(8, 24, seed=2), randoms(8, 72, seed=3), torch.tensor([8, 9])
    ancestors = torch.zeros(2, 4, 16, dtype=torch.long)
    of_12 = randoms(2, 3, 16, 12, seed=1)
    refused: dict[str, Callable[[], Tensor]] = {
        "query is": lambda: cpu_kernels.cross_attention(query[:, :16], keys, keys, lengths),
        "query": lambda: cpu_kernels.cross_attention(query[:7], keys, keys, lengths),
        "values": lambda: cpu_kernels.cross_attention(query, keys, keys[:, :, :8], lengths),
        "at most 2 fit": lambda: cpu_kernels.cross_attention(query[:6], keys, keys, torch.tensor([1, 2, 3])),
        "heads of 12": lambda: cpu_kernels.cross_attention(randoms(8, 36, seed=1), of_12, of_12, lengths),
        "as it lies in C": lambda: cpu_kernels.cross_attention(query, keys, keys[:, [0]].expand_as(keys), lengths),
        "not torch.int64": lambda: cpu_kernels.cross_attention(query, keys, keys, lengths.int()),
        "qkv": lambda: cpu_kernels.self_attention(query, own, own, ancestors, lengths),
        "ancestors": lambda: cpu_kernels.self_attention(qkv, own, own, ancestors[:, :, :9].contiguous(), lengths),
        "qkv is": lambda: cpu_kernels.source_attention(qkv.view(8, 3, 3, 8), [4, 5]),
        "sources of": lambda: cpu_kernels.source_attention(qkv.view(8, 3, 3, 8), [9, -1]),
        "heads of 6": lambda: cpu_kernels.source_attention(qkv.view(8, 3, 4, 6), [8]),
        "float64": lambda: cpu_kernels.source_attention(qkv.view(8, 3, 3, 8).double(), [8]),
    }
    for name, wrong in refused.items():
        with pytest.raises(ValueError, match=name):
            wrong()


@pytest.mark.usefixtures("not_yet_asked")
def test_what_was_compiled_from_another_version_is_not_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_VERSION", 0)
    assert kernels.cpu_kernels() is None
    assert "was compiled from another version" in caplog.text


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_an_engine_of_kernels_says_what_one_of_torch_says(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    folder = save(tiny_model(seed=3, shape=TinyShape(vocab=130, hidden=32, decoder=decoder)), tmp_path)
    params = GenerationParams(num_beams=4, num_return_sequences=4, max_new_tokens=20, no_repeat_ngram_size=3)
    sources = random_sources(9, seed=2, longest=40)

    def said(with_kernels: bool) -> list[list[tuple[int, ...]]]:
        engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=4, device="cpu"))
        outputs = engine.generate(sources, params)
        (batch,) = engine.runner.batches.values()
        assert (batch.cache._kernels is cpu_kernels) is with_kernels
        decoder = batch.model.decoder
        assert isinstance(decoder, (BertDecoder, Gpt2Decoder))
        assert isinstance(decoder.cross_key_values[0], PanelLinear) is with_kernels
        return [[hypothesis.token_ids for hypothesis in output.hypotheses] for output in outputs]

    mine = said(True)
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    assert mine == said(False)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_texts_logits_are_the_same_in_any_company_to_the_last_bit(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(checkpoint, "bfloat16_is_fast", lambda: False)
    folder = save(tiny_model(seed=5, shape=TinyShape(vocab=130, hidden=48, encoder_hidden=48)), tmp_path)
    params = GenerationParams(num_beams=4, max_new_tokens=25, no_repeat_ngram_size=3)
    sources = random_sources(7, seed=4, longest=40)
    engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=5, dtype=dtype))

    def logits(company: list[list[int]]) -> dict[tuple[int, ...], Tensor]:
        first, *others = [Sequence(tuple(ids), params) for ids in company]
        with Recorder() as recorder:
            for index, sequence in enumerate((first, *others)):
                engine.add(sequence)
                if index % 3 == 0:
                    engine.step()
            while engine.scheduler.has_work:
                engine.step()
            (found,) = recorder.logits(first)
        return dict(found)

    alone, together = logits(sources[:1]), logits(sources)
    assert len(alone) > 20
    assert alone.keys() == together.keys()
    assert all(torch.equal(row, together[prefix]) for prefix, row in alone.items())


def test_heads_of_other_sizes_and_more_keys_are_torchs() -> None:
    """And a model that takes long sources has kernels while they are short."""
    for head_size, source, fits in ((64, 512, True), (12, 512, False), (64, 4096, True), (64, 4097, False)):
        cache = KVCache(CacheShape(1, 1, 1, head_size, 8192, 8), 1, CPU, torch.float32)
        step = cache.begin_step(torch.tensor([0]), torch.tensor([source]), 1, source, ragged=False)
        assert isinstance(step, KernelStepCache if fits else TorchStepCache)
