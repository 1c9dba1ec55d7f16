"""Products in C against torch's in fp64, with weights in 32, 16 and 8 bits, with vectors of both lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine import cpu_kernels
from tests.cpu_builds import assert_close, needs_kernels, randoms, wide

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 24, 25, 127, 250])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_a_product_is_what_torch_computes(rows: int, dtype: torch.dtype) -> None:
    for panels_of, inputs in ((1, 1), (3, 255), (4, 513), (9, 768)):
        outputs = panels_of * wide()
        weight = randoms(outputs, inputs, seed=outputs) / inputs**0.5
        weight = weight.to(dtype).float()
        x, bias, residual = randoms(rows, inputs, seed=1), randoms(outputs, seed=2), randoms(rows, outputs, seed=3)
        panels = cpu_kernels.pack(weight, dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert_close(cpu_kernels.multiply(x, panels, bias), exact)
        assert_close(cpu_kernels.multiply(x, panels, bias, residual), exact + residual.double())
        exact[:, :9] *= 0.3
        assert_close(cpu_kernels.multiply(x, panels, bias, scale=0.3, scaled=9, gelu=True), F.gelu(exact))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs", [160, 32 * 40])  # units of work one by one, and four at a time
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_a_row_of_a_product_does_not_depend_on_the_others(outputs: int, dtype: torch.dtype) -> None:
    """To the last bit: every way to group rows adds in the same order."""
    panels, bias = cpu_kernels.pack(randoms(outputs, 700, seed=1), dtype), randoms(outputs, seed=2)
    x = randoms(251, 700, seed=3)
    expected = cpu_kernels.multiply(x, panels, bias, gelu=True)
    for count in (*range(1, 26), 128, 129, 139, 141, 250):
        assert torch.equal(cpu_kernels.multiply(x[:count], panels, bias, gelu=True), expected[:count])
        assert torch.equal(cpu_kernels.multiply(x[-count:], panels, bias, gelu=True), expected[-count:])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25, 121, 250])
@torch.inference_mode()
def test_a_product_in_8_bits_is_that_of_the_rounded_weights(rows: int) -> None:
    """Inputs keep 13 bits at least: each is off by half of one of 4,095 parts of its row's largest."""
    for panels_of, inputs in ((1, 2), (2, 8), (3, 254), (4, 514), (9, 3072)):
        outputs = panels_of * wide()
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
            panels, scales = cpu_kernels.pack_int8(torch.full((32, inputs), sign))
            product = cpu_kernels.multiply_int8(torch.ones(7, inputs), panels, scales, torch.zeros(32))
            torch.testing.assert_close(product, torch.full((7, 32), sign * inputs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("outputs", [160, 32 * 40])
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_a_row_of_a_product_in_8_bits_does_not_depend_on_the_others(outputs: int) -> None:
    panels, scales = cpu_kernels.pack_int8(randoms(outputs, 700, seed=1))
    x, bias = randoms(251, 700, seed=3) * 10.0 ** (torch.arange(251) % 5 - 2)[:, None], randoms(outputs, seed=2)
    expected = cpu_kernels.multiply_int8(x, panels, scales, bias, gelu=True)
    for count in (*range(1, 26), 128, 129, 139, 141, 250):
        assert torch.equal(cpu_kernels.multiply_int8(x[:count], panels, scales, bias, gelu=True), expected[:count])
        assert torch.equal(cpu_kernels.multiply_int8(x[-count:], panels, scales, bias, gelu=True), expected[-count:])


@pytest.mark.parametrize("bits", [8, 32])
@torch.inference_mode()
def test_a_product_is_the_same_in_memory_that_is_given(bits: int) -> None:
    x, bias, residual = randoms(33, 64, seed=1), randoms(96, seed=2), randoms(33, 96, seed=3)
    if bits == 8:
        multiply = partial(cpu_kernels.multiply_int8, x, *cpu_kernels.pack_int8(randoms(96, 64, seed=4)), bias)
    else:
        multiply = partial(cpu_kernels.multiply, x, cpu_kernels.pack(randoms(96, 64, seed=4), torch.float32), bias)
    out = torch.full((33, 96), torch.nan)
    assert multiply(residual, out=out) is out
    assert torch.equal(out, multiply(residual))
    for wrong, message in (
        (torch.empty(33, 95), r"out is \[33, 95\]"),
        (torch.empty(96, 33).T, "not torch.float32 as it lies in C"),
        (torch.empty(33, 96, dtype=torch.float64), "not torch.float32 as it lies in C"),
        (residual, "shares memory with what is read"),
        (torch.as_strided(x, (33, 96), (0, 1)), "shares memory with what is read"),
    ):
        with pytest.raises(ValueError, match=message):
            multiply(residual, out=wrong)


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
    identity = cpu_kernels.pack(torch.ones(32, 1), torch.float32)
    found = cpu_kernels.multiply(x[:, None], identity, torch.zeros(32), gelu=True)[:, 0].double()
    exact = F.gelu(x.double())
    assert ((found - exact).abs() <= 4 * 2.0**-24 * x.double().abs()).all()
    assert torch.equal(found[-5:], exact[-5:])
    rest = cpu_kernels.multiply(torch.tensor([[torch.inf], [torch.nan]]), identity, torch.zeros(32), gelu=True)
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
            *cpu_kernels.pack_int8(torch.ones(32, 64, dtype=torch.float32)),
            torch.zeros(32, dtype=torch.float32),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(product, torch.full((300, 32), 64.0))


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
        "panels is torch.float64": lambda: cpu_kernels.multiply(x, panels.double(), bias),
        "as it lies in C": lambda: cpu_kernels.multiply(x, panels.transpose(1, 2).contiguous().transpose(1, 2), bias),
    }
    for name, wrong in refused.items():
        with pytest.raises(ValueError, match=name):
            wrong()
