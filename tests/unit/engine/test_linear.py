"""Each form of a matrix product against the plain one."""

from __future__ import annotations

import platform
from types import ModuleType

import pytest
import torch

from app.engine import linear
from app.engine.linear import (
    ACTIVATIONS,
    DenseLinear,
    FewRowsInt8Linear,
    FewRowsLinear,
    Float16WeightsLinear,
    Form,
    Int8Linear,
    MakeLinear,
    ManyRowsInt8Linear,
    PackedLinear,
    Scale,
    choose_linear,
    fits_float16,
    largest_weight,
    packs,
    stacked,
)

WEIGHT, BIAS = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 96)
# Rows of very different size: each is rounded on a scale of its own.
ROWS = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.01, 100.0, 3.0])[:, None]


on_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="torch has FBGEMM on x86 with AVX2 alone")
needs_fbgemm = pytest.mark.skipif(not Float16WeightsLinear.is_available(), reason="torch has no FBGEMM here")
INT8 = [ManyRowsInt8Linear, *([FewRowsInt8Linear] if FewRowsInt8Linear.is_available() else [])]
FLOAT16_WEIGHTS = [Float16WeightsLinear] if Float16WeightsLinear.is_available() else []
IN_FLOAT16 = WEIGHT.half().float()


def test_packed_equals_plain() -> None:
    plain, packed = DenseLinear(WEIGHT, BIAS)(ROWS), PackedLinear(WEIGHT, BIAS)(ROWS)
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", INT8)
@pytest.mark.parametrize("steps", sorted({64, largest_weight()}))
def test_int8_is_within_two_percent_of_each_row(
    form: type[Int8Linear], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "largest_weight", lambda: steps)
    plain, rounded = DenseLinear(WEIGHT, BIAS)(ROWS), form(WEIGHT, BIAS)(ROWS)
    assert ((rounded - plain).norm(dim=1) / (plain - BIAS).norm(dim=1)).max() < 0.02


def test_without_vnni_two_products_of_bytes_fit_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert 2 * (Int8Linear.SHIFT + 127) * largest_weight() <= torch.iinfo(torch.int16).max


@pytest.mark.parametrize("form", INT8)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int8_adds_the_largest_products_without_overflow(form: type[Int8Linear], sign: float) -> None:
    """Of numbers that bytes hold exactly."""
    weight, rows = torch.full((96, 3072), sign), torch.full((40, 3072), 1.0)
    torch.testing.assert_close(form(weight, BIAS)(rows), sign * 3072 + BIAS.expand(40, -1))


@pytest.mark.parametrize("form", INT8)
def test_int8_of_a_row_does_not_depend_on_the_others(form: type[Int8Linear]) -> None:
    """Nor on how many there are: a library has other kernels for more."""
    product, rows = form(WEIGHT, BIAS), ROWS.repeat(70, 1)
    assert torch.equal(torch.cat([product(row[None]) for row in ROWS]).repeat(70, 1), product(rows))


@pytest.mark.parametrize("steps", sorted({64, largest_weight()}))
@pytest.mark.skipif(len(INT8) < 2, reason="torch has no FBGEMM for this processor")
def test_forms_of_int8_round_alike(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a number just between two bytes: one of 64 that differs moves a row by 0.0025."""
    monkeypatch.setattr(linear, "largest_weight", lambda: steps)
    many, few = (form(WEIGHT, BIAS)(ROWS) - BIAS for form in INT8)
    assert ((many - few).norm(dim=1) / many.norm(dim=1)).max() < 5e-3


@on_avx2
def test_fbgemm_is_there_on_x86() -> None:
    assert FewRowsInt8Linear.is_available()
    assert Float16WeightsLinear.is_available()


@needs_fbgemm
@pytest.mark.parametrize("rows", [1, 4, 24, 25, 130])
def test_weights_that_fp16_holds_are_multiplied_in_fp32(rows: int) -> None:
    """The smallest numbers of fp16 included."""
    weight = (WEIGHT * 10.0 ** torch.arange(-7, 5).repeat_interleave(8)[:, None]).half().float()
    assert 0 < weight[0].abs().max() < torch.finfo(torch.float16).smallest_normal
    x, scale = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)), Scale(32, 0.3)
    for scaled in (None, scale):
        exact = DenseLinear(weight.double(), BIAS.double())(x.double())
        exact[:, :32] *= scale.by if scaled else 1.0
        off = Float16WeightsLinear(weight, BIAS, scale=scaled)(x) - exact
        assert (off.abs() <= 1e-6 * DenseLinear(weight.abs(), BIAS.abs())(x.abs())).all()


@needs_fbgemm
def test_by_weights_in_fp16_what_is_no_number_stays_in_its_row() -> None:
    product, rows = Float16WeightsLinear(IN_FLOAT16, BIAS), ROWS.repeat(70, 1)
    rows[2, 5], rows[7, 5] = torch.nan, torch.inf
    out = product(rows)
    assert out[2].isnan().all()
    assert not out[7].isfinite().any()
    assert [row.isfinite().all().item() for row in out] == [index not in (2, 7) for index in range(len(rows))]


@needs_fbgemm
@pytest.mark.parametrize(("shape", "many"), [((24,), False), ((4, 6), False), ((25,), True), ((5, 5), True)])
def test_more_rows_than_few_have_the_second_form(shape: tuple[int, ...], many: bool) -> None:
    second, x = torch.zeros(*shape, 96), torch.randn(*shape, 64)
    product = Float16WeightsLinear(IN_FLOAT16, BIAS, of_many_rows=lambda x, residual=None: second)
    assert (product(x) is second) is many
    assert (product(x, torch.ones(*shape, 96)) is second) is many


@needs_fbgemm
def test_large_weights_have_a_second_form(monkeypatch: pytest.MonkeyPatch) -> None:
    make, x, scale = MakeLinear(PackedLinear, float16_weights=True), torch.randn(25, 64), Scale(32, 0.3)
    monkeypatch.setattr(Float16WeightsLinear, "LARGE", WEIGHT.numel())
    product = make(IN_FLOAT16, BIAS)
    assert isinstance(product, Float16WeightsLinear)
    assert product.of_many_rows is None
    monkeypatch.setattr(Float16WeightsLinear, "LARGE", WEIGHT.numel() - 1)
    product = make(IN_FLOAT16, BIAS, scale=scale)
    assert isinstance(product, Float16WeightsLinear)
    assert isinstance(product.of_many_rows, PackedLinear)
    assert torch.equal(product(x), PackedLinear(*scale.times(IN_FLOAT16, BIAS))(x))


@needs_fbgemm
def test_products_of_many_rows_have_no_second_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Float16WeightsLinear, "LARGE", 0)
    product = MakeLinear(DenseLinear, float16_weights=True)(IN_FLOAT16, BIAS)
    assert isinstance(product, Float16WeightsLinear)
    assert product.of_many_rows is None


@needs_fbgemm
@pytest.mark.parametrize("by", [0.125, 32**-0.5])
def test_a_scale_is_in_the_weights_where_they_still_fit(by: float) -> None:
    make, plain = MakeLinear(PackedLinear, float16_weights=True), MakeLinear(DenseLinear)
    weight = IN_FLOAT16.masked_fill(IN_FLOAT16.abs() < 1e-3, 0.0)
    product = make(weight, BIAS, scale=Scale(32, by))
    assert isinstance(product, Float16WeightsLinear)
    assert (product.scale is None) is (by == 0.125)
    torch.testing.assert_close(product(ROWS), plain(weight, BIAS, scale=Scale(32, by))(ROWS), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("number", "fits"),
    [
        (2.0**-24, True),
        (65504.0, True),
        (2.0**-25, False),
        (65536.0, False),
        (torch.inf, False),
        (-torch.inf, False),
        (torch.nan, False),
    ],
)
def test_what_fits_fp16_is_what_it_holds_exactly(number: float, fits: bool) -> None:
    for row in range(2):
        weight = torch.ones(2, 3)
        weight[row, 1] = number
        assert fits_float16(weight) is fits
    assert not fits_float16(WEIGHT)


@on_avx2
@pytest.mark.parametrize("few_rows", [True, False])
def test_weights_are_kept_in_fp16_where_nothing_is_lost_on_processors_without_avx512(
    few_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def form(weight: torch.Tensor, int8: bool = False, dtype: torch.dtype = torch.float32) -> type:
        return type(choose_linear(torch.device("cpu"), dtype, int8, few_rows)(weight, BIAS, scale=Scale(32, 0.3)))

    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert form(IN_FLOAT16) is Float16WeightsLinear
    assert form(WEIGHT) is (PackedLinear if few_rows else DenseLinear)
    assert form(IN_FLOAT16, int8=True) is not Float16WeightsLinear
    assert form(IN_FLOAT16, dtype=torch.bfloat16) is not Float16WeightsLinear
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert form(IN_FLOAT16) is (PackedLinear if few_rows else DenseLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_outputs_are_scaled_with_their_biases(dtype: torch.dtype) -> None:
    weight, bias = Scale(32, 0.3).times(WEIGHT.to(dtype), BIAS.to(dtype))
    assert weight.dtype is bias.dtype is dtype
    assert torch.equal(weight, torch.cat([WEIGHT[:32].to(dtype) * 0.3, WEIGHT[32:].to(dtype)]))
    assert torch.equal(bias, torch.cat([BIAS[:32].to(dtype) * 0.3, BIAS[32:].to(dtype)]))


@on_avx2
@pytest.mark.parametrize(
    ("machine", "vnni", "engine", "few_rows", "form"),
    [
        ("x86_64", False, "x86", True, FewRowsInt8Linear),
        ("x86_64", False, "x86", False, ManyRowsInt8Linear),
        ("x86_64", False, "onednn", True, ManyRowsInt8Linear),
        ("x86_64", True, "x86", True, ManyRowsInt8Linear),
        ("aarch64", False, "fbgemm", True, ManyRowsInt8Linear),
    ],
)
def test_int8_of_few_rows_is_fbgemms_on_x86_without_vnni(
    machine: str, vnni: bool, engine: str, few_rows: bool, form: type[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    chosen: object = choose_linear(torch.device("cpu"), torch.float32, True, few_rows).form
    assert chosen is form


@pytest.mark.parametrize("form", INT8)
def test_int8_of_an_infinite_row_is_not_finite(form: type[Int8Linear]) -> None:
    rows = ROWS.clone()
    rows[2, 5] = torch.inf
    out = form(WEIGHT, BIAS)(rows)
    assert not out[2].isfinite().any()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("form", INT8)
def test_int8_keeps_zeros_and_what_is_no_number(form: type[Int8Linear]) -> None:
    rows = ROWS.clone()
    rows[1] = 0.0
    rows[2, 5] = torch.nan
    out = form(WEIGHT, BIAS)(rows)
    torch.testing.assert_close(out[1], BIAS)
    assert out[2].isnan().all()
    assert not out[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", [DenseLinear, PackedLinear, *INT8, *FLOAT16_WEIGHTS])
def test_what_follows_a_product_goes_with_it(name: str, form: Form) -> None:
    plain = form(WEIGHT, BIAS)(ROWS)
    activated = form(WEIGHT, BIAS, ACTIVATIONS[name])(ROWS)
    torch.testing.assert_close(activated, ACTIVATIONS[name].function(plain), rtol=1e-5, atol=1e-5)
    residual = torch.randn(4, 96)
    kept = residual.clone()
    torch.testing.assert_close(form(WEIGHT, BIAS)(ROWS, residual), plain + residual, rtol=1e-5, atol=1e-4)
    assert torch.equal(residual, kept)


def test_stacked_is_several_products_at_once() -> None:
    both = DenseLinear(*stacked([(WEIGHT, BIAS), (-WEIGHT, BIAS)]))(ROWS)
    torch.testing.assert_close(both[:, :96], DenseLinear(WEIGHT, BIAS)(ROWS))
    torch.testing.assert_close(both[:, 96:], DenseLinear(-WEIGHT, BIAS)(ROWS))


@pytest.mark.parametrize(
    ("device", "dtype", "int8", "few_rows", "form"),
    [
        ("cpu", torch.float32, False, True, PackedLinear),
        ("cpu", torch.bfloat16, False, True, PackedLinear if packs(torch.bfloat16) else DenseLinear),
        ("cpu", torch.float32, False, False, DenseLinear),
        ("cpu", torch.float16, False, True, DenseLinear),
        ("cuda", torch.bfloat16, False, False, DenseLinear),
    ],
)
def test_the_form_follows_the_device(
    device: str, dtype: torch.dtype, int8: bool, few_rows: bool, form: type[object]
) -> None:
    chosen: object = choose_linear(torch.device(device), dtype, int8, few_rows).form
    assert chosen is form


@pytest.mark.parametrize("installed", [True, False])
def test_few_rows_have_a_kernel_on_cuda_where_there_is_one(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ModuleType("kernels") if installed else None
    monkeypatch.setattr(linear, "kernels_for", lambda device: kernels)
    made = choose_linear(torch.device("cuda"), torch.bfloat16, False, few_rows=True)(WEIGHT, BIAS)
    assert type(made) is (FewRowsLinear if installed else DenseLinear)
