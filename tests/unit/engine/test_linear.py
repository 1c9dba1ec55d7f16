"""Each form of a matrix product against the plain one."""

from __future__ import annotations

import platform
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from app.engine import cpu_kernels, kernels, linear
from app.engine.linear import (
    ACTIVATIONS,
    DenseLinear,
    FewRowsLinear,
    Form,
    Int8Linear,
    Int8PanelLinear,
    PackedLinear,
    PanelLinear,
    Scale,
    Workspace,
    choose_linear,
    fits_float16,
    largest_weight,
    packs,
    rows_dtype,
    stacked,
)

WEIGHT, BIAS = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 96)
# Rows of very different size: each is rounded on a scale of its own.
ROWS = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.01, 100.0, 3.0])[:, None]


needs_kernels = pytest.mark.skipif(kernels.cpu_kernels() is None, reason="kernels do not work: test_cpu_kernels.py")
PANELS: Any = partial(PanelLinear, kernels=cpu_kernels)
INT8_PANELS: Any = partial(Int8PanelLinear, kernels=cpu_kernels)
INT8 = [Int8Linear, pytest.param(INT8_PANELS, marks=needs_kernels)]
IN_FLOAT16 = WEIGHT.half().float()


def test_packed_equals_plain() -> None:
    plain, packed = DenseLinear(WEIGHT, BIAS)(ROWS), PackedLinear(WEIGHT, BIAS)(ROWS)
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "steps", "most"),
    [*((Int8Linear, n, 0.02) for n in (64, 127)), pytest.param(INT8_PANELS, 127, 0.008, marks=needs_kernels)],
)
def test_int8_is_close_to_each_row(form: Form, steps: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels, whose inputs have more bits, closer."""
    monkeypatch.setattr(linear, "largest_weight", lambda: min(steps, largest_weight()))
    plain, rounded = DenseLinear(WEIGHT, BIAS)(ROWS), form(WEIGHT, BIAS)(ROWS)
    assert ((rounded - plain).norm(dim=1) / (plain - BIAS).norm(dim=1)).max() < most


@pytest.mark.parametrize(
    "form",
    [DenseLinear, PackedLinear, Int8Linear, *(pytest.param(f, marks=needs_kernels) for f in (PANELS, INT8_PANELS))],
)
@pytest.mark.parametrize("outputs", [96, 90])  # 90 are filled up in panels
def test_a_workspace_changes_no_result(form: Form, outputs: int) -> None:
    product = form(WEIGHT[:outputs], BIAS[:outputs])
    workspace = Workspace()
    workspace.take(len(ROWS) * 96).fill_(torch.nan)
    for rows in (ROWS[:2], ROWS, ROWS[:1]):
        assert torch.equal(product(rows, workspace=workspace), product(rows))
        residual = torch.ones(len(rows), outputs)
        assert torch.equal(product(rows, residual, workspace), product(rows, residual))


def test_a_workspace_gives_the_same_memory_until_more_is_asked_for() -> None:
    workspace = Workspace()
    first, smaller = workspace.take(4, 6), workspace.take(3, 2)
    assert (first.shape, smaller.shape) == ((4, 6), (3, 2))
    assert first.data_ptr() == smaller.data_ptr() == workspace.take(24).data_ptr()
    assert workspace.take(5, 5).data_ptr() != first.data_ptr()


@needs_kernels
def test_products_in_panels_lie_in_the_workspace() -> None:
    workspace = Workspace()
    memory = workspace.take(1000)
    product = PANELS(WEIGHT, BIAS)(ROWS, workspace=workspace)
    assert product.data_ptr() == memory.data_ptr()


def test_without_vnni_two_products_of_bytes_fit_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert 2 * (Int8Linear.SHIFT + 127) * largest_weight() <= torch.iinfo(torch.int16).max


@pytest.mark.parametrize("form", INT8)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int8_adds_the_largest_products_without_overflow(form: Form, sign: float) -> None:
    """Of numbers that bytes hold exactly."""
    weight, rows = torch.full((96, 3072), sign), torch.full((40, 3072), 1.0)
    torch.testing.assert_close(form(weight, BIAS)(rows), sign * 3072 + BIAS.expand(40, -1))


@pytest.mark.parametrize("form", INT8)
def test_int8_of_a_row_does_not_depend_on_the_others(form: Form) -> None:
    """Nor on how many there are: a library has other kernels for more."""
    product, rows = form(WEIGHT, BIAS), ROWS.repeat(70, 1)
    assert torch.equal(torch.cat([product(row[None]) for row in ROWS]).repeat(70, 1), product(rows))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 4, 24, 25, 130])
def test_weights_that_fp16_holds_are_multiplied_in_fp32(rows: int) -> None:
    """The smallest numbers of fp16 included."""
    weight = (WEIGHT * 10.0 ** torch.arange(-7, 5).repeat_interleave(8)[:, None]).half().float()
    assert 0 < weight[0].abs().max() < torch.finfo(torch.float16).smallest_normal
    x, scale = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)), Scale(32, 0.3)
    for scaled in (None, scale):
        exact = DenseLinear(weight.double(), BIAS.double())(x.double())
        exact[:, :32] *= scale.by if scaled else 1.0
        product = PANELS(weight, BIAS, scale=scaled)
        assert product.panels.dtype is torch.float16
        off = product(x) - exact
        assert (off.abs() <= 1e-6 * DenseLinear(weight.abs(), BIAS.abs())(x.abs())).all()


@needs_kernels
@pytest.mark.parametrize("weight", [IN_FLOAT16, WEIGHT])
def test_of_panels_what_is_no_number_stays_in_its_row(weight: torch.Tensor) -> None:
    product, rows = PANELS(weight, BIAS, ACTIVATIONS["gelu"]), ROWS.repeat(70, 1)
    rows[2, 5], rows[7, 5] = torch.nan, torch.inf
    out = product(rows)
    assert out[2].isnan().all()
    assert not out[7, weight[:, 5] > 0].isfinite().any()
    assert [row.isfinite().all().item() for row in out] == [index not in (2, 7) for index in range(len(rows))]


@needs_kernels
@pytest.mark.parametrize("weight", [IN_FLOAT16, WEIGHT])
@pytest.mark.parametrize("outputs", [1, 90, 96])
def test_panels_are_filled_up_for_any_number_of_outputs(outputs: int, weight: torch.Tensor) -> None:
    residual = torch.randn(4, outputs)
    for activation in ("gelu", "gelu_new"):
        ours, plain = (
            form(weight[:outputs], BIAS[:outputs], ACTIVATIONS[activation])(ROWS) for form in (PANELS, DenseLinear)
        )
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    ours, plain = (form(weight[:outputs], BIAS[:outputs])(ROWS, residual) for form in (PANELS, DenseLinear))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("outputs", [1, 90, 96])
def test_panels_in_8_bits_are_filled_up_for_any_number_of_outputs(outputs: int) -> None:
    weight, bias, residual = WEIGHT[:outputs, :63], BIAS[:outputs], torch.randn(4, outputs)
    whole = INT8_PANELS(WEIGHT[:, :63], BIAS)(ROWS[:, :63])[:, :outputs]
    ours = INT8_PANELS(weight, bias)(ROWS[:, :63])
    assert ours.is_contiguous()
    assert torch.equal(ours, whole)
    torch.testing.assert_close(INT8_PANELS(weight, bias)(ROWS[:, :63], residual), whole + residual)
    activated = INT8_PANELS(weight, bias, ACTIVATIONS["gelu_new"])(ROWS[:, :63])
    torch.testing.assert_close(activated, ACTIVATIONS["gelu_new"].function(whole))


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


@needs_kernels
@pytest.mark.parametrize("few_rows", [True, False])
def test_rows_in_fp32_are_multiplied_in_panels_with_weights_in_as_few_bytes_as_asked_for(
    few_rows: bool, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(weight: torch.Tensor, dtype: torch.dtype, rows: torch.dtype = torch.float32) -> Any:
        return choose_linear(torch.device("cpu"), dtype, False, few_rows, rows)(weight, BIAS, scale=Scale(32, 0.3))

    for weight, dtype, kept in (
        (IN_FLOAT16, torch.float32, torch.float16),
        (IN_FLOAT16, torch.bfloat16, torch.float16),
        (WEIGHT, torch.float32, torch.float32),
        (WEIGHT, torch.bfloat16, torch.bfloat16),
    ):
        product = made(weight, dtype)
        assert isinstance(product, PanelLinear)
        assert product.panels.dtype is kept
        plain = DenseLinear(*Scale(32, 0.3).times(weight.to(kept).float(), BIAS))
        torch.testing.assert_close(product(ROWS), plain(ROWS), rtol=1e-5, atol=1e-4)
    assert not isinstance(made(WEIGHT.bfloat16(), torch.bfloat16, torch.bfloat16), PanelLinear)
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    assert type(made(IN_FLOAT16, torch.float32)) is (PackedLinear if few_rows else DenseLinear)


@pytest.mark.parametrize("few_rows", [True, False])
def test_fp32_is_the_librarys_with_avx512_and_no_vnni(few_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    made = choose_linear(torch.device("cpu"), torch.float32, False, few_rows)(IN_FLOAT16, BIAS)
    assert type(made) is (PackedLinear if few_rows else DenseLinear)


@needs_kernels
@pytest.mark.usefixtures("processor")
def test_rows_are_in_fp32_between_weights_in_bf16_where_the_librarys_are_no_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    for faster, rows in ((False, torch.float32), (True, bf16)):
        monkeypatch.setattr(kernels, "_bfloat16_is_faster", lambda faster=faster: faster)
        assert rows_dtype(cpu, bf16, int8=False) is rows
        assert rows_dtype(cpu, bf16, int8=True) is rows_dtype(cpu, torch.float32, int8=False) is torch.float32
    monkeypatch.setattr(kernels, "_bfloat16_is_faster", lambda: False)
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    assert rows_dtype(cpu, bf16, int8=False) is bf16
    assert rows_dtype(torch.device("cuda"), bf16, int8=False) is bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_outputs_are_scaled_with_their_biases(dtype: torch.dtype) -> None:
    weight, bias = Scale(32, 0.3).times(WEIGHT.to(dtype), BIAS.to(dtype))
    assert weight.dtype is bias.dtype is dtype
    assert torch.equal(weight, torch.cat([WEIGHT[:32].to(dtype) * 0.3, WEIGHT[32:].to(dtype)]))
    assert torch.equal(bias, torch.cat([BIAS[:32].to(dtype) * 0.3, BIAS[32:].to(dtype)]))


@needs_kernels
@pytest.mark.parametrize("few_rows", [True, False])
def test_int8_is_multiplied_in_panels_but_many_rows_by_the_library_where_it_has_vnni(
    few_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where fp32 is not, with AVX-512 and no VNNI."""

    def made() -> object:
        return choose_linear(torch.device("cpu"), torch.float32, True, few_rows)(WEIGHT, BIAS)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert isinstance(made(), Int8PanelLinear)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert isinstance(made(), Int8PanelLinear if few_rows else Int8Linear)
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    assert isinstance(made(), Int8Linear)


@pytest.mark.parametrize(
    ("machine", "vnni", "most"), [("x86_64", False, 64), ("x86_64", True, 127), ("arm64", False, 127)]
)
def test_weights_of_onednn_have_7_bits_where_bytes_are_added_in_16(
    machine: str, vnni: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    assert largest_weight() == most


@pytest.mark.parametrize("form", INT8)
def test_int8_of_an_infinite_row_is_not_finite(form: Form) -> None:
    rows = ROWS.clone()
    rows[2, 5] = torch.inf
    out = form(WEIGHT, BIAS)(rows)
    assert not out[2].isfinite().any()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("form", INT8)
def test_int8_keeps_zeros_and_what_is_no_number(form: Form) -> None:
    rows = ROWS.clone()
    rows[1] = 0.0
    rows[2, 5] = torch.nan
    out = form(WEIGHT, BIAS)(rows)
    torch.testing.assert_close(out[1], BIAS)
    assert out[2].isnan().all()
    assert not out[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", [DenseLinear, PackedLinear, *INT8, pytest.param(PANELS, marks=needs_kernels)])
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
        ("cpu", torch.bfloat16, False, True, PackedLinear if packs(torch.bfloat16) else DenseLinear),
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
