"""A matrix product with fixed weights, in the form that the device multiplies fastest.

What follows a product goes with it: an activation, which is fixed with the weights, or a sum with a residual. Knows
weights, dtypes, processors, and the forms that oneDNN and kernels of ours pack. Does not know networks. Every
form maps [..., in] to [..., out].
"""

from __future__ import annotations

import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.kernels import cpu_kernels_for, int8_kernels_for, kernels_for, multiplies_bfloat16_in_fp32


class Activation(NamedTuple):
    """A function of single numbers, and what oneDNN calls it when it comes after a product."""

    function: Callable[[Tensor], Tensor]
    post_op: tuple[str, str]
    name: str  # a BERT's for it


IDENTITY = Activation(lambda x: x, ("none", ""), "")
# By the names of a BERT's `hidden_act`.
ACTIVATIONS = {
    "gelu": Activation(F.gelu, ("gelu", "none"), "gelu"),
    "gelu_new": Activation(partial(F.gelu, approximate="tanh"), ("gelu", "tanh"), "gelu_new"),
    "relu": Activation(F.relu, ("relu", ""), "relu"),
}


class Workspace:
    """Memory that products write to one after the other, in place of new memory for each.

    Large tensors have maps of their own (ADR 21), whose pages the system fills with zeros before they are written: on a
    CPU a product then waits for them. What a product wrote is gone when the next one writes.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32)

    def take(self, *shape: int) -> Tensor:
        """[shape] fp32, of any content; the same memory every time."""
        count = math.prod(shape)
        if len(self._memory) < count:
            self._memory = torch.empty(count, dtype=torch.float32)
        return self._memory[:count].view(shape)


class Linear(Protocol):
    """x [..., in] to activation(x W^T + b) + residual, [..., out].

    The result may lie in `workspace`, where one is given, which must hold neither x nor residual.
    """

    def __call__(  # noqa: D102
        self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None
    ) -> Tensor: ...


class Scale(NamedTuple):
    """What a product's first outputs are multiplied by, their biases included: attention's queries."""

    outputs: int
    by: float

    def times(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias [out] that give the scaled product at once."""
        factor = torch.ones_like(bias, dtype=torch.float32)
        factor[: self.outputs] = self.by
        return (weight * factor[:, None]).to(weight.dtype), (bias * factor).to(bias.dtype)


class Form(Protocol):
    """A form's constructor: weight [out, in], bias [out]. With an activation, a Linear takes no residual."""

    def __call__(self, weight: Tensor, bias: Tensor, activation: Activation = IDENTITY) -> Linear: ...  # noqa: D102


@dataclass(frozen=True)
class MakeLinear:
    """Makes the products of one kind on one device."""

    form: Form

    def __call__(
        self, weight: Tensor, bias: Tensor, activation: Activation = IDENTITY, scale: Scale | None = None
    ) -> Linear:
        """Weight [out, in], bias [out]."""
        return self.form(*((weight, bias) if scale is None else scale.times(weight, bias)), activation)


@dataclass(frozen=True)
class MakePanelLinear(MakeLinear):
    """Where a scale comes after the product: fp16 may not hold the weights that give the scaled product at once."""

    form: Callable[..., PanelLinear]

    def __call__(
        self, weight: Tensor, bias: Tensor, activation: Activation = IDENTITY, scale: Scale | None = None
    ) -> Linear:
        """Weight [out, in], bias [out]."""
        return self.form(weight, bias, activation, scale)


@dataclass(frozen=True)
class DenseLinear:
    """Weights as they lie in the checkpoint: best for many rows (an encoder), and for devices that need no packing."""

    weight: Tensor  # [out, in]
    bias: Tensor  # [out]
    activation: Activation = IDENTITY

    def __call__(self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        """[..., in] -> [..., out], in new memory."""
        product = self.activation.function(F.linear(x, self.weight, self.bias))
        return product if residual is None else product + residual


@dataclass(frozen=True)
class FewRowsLinear(DenseLinear):
    """On a GPU: few rows by a kernel of ours that knows no other, with bias and activation; more as they always were.

    A library's product of four rows is a kernel for 64, or one for parts of the sum and a second that adds them.
    """

    kernels: ModuleType = field(kw_only=True)  # `app.engine.triton_kernels`

    def __call__(self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        """[..., in] -> [..., out], in new memory."""
        if not self.kernels.takes(x, self.weight, self.activation.name):
            return super().__call__(x, residual)
        product: Tensor = self.kernels.linear(x, self.weight, self.bias, self.activation.name)
        return product if residual is None else product + residual

    def in_parts(self, x: Tensor) -> Tensor:
        """[..., in] -> [P, ..., out], still to be added up; of a product without an activation."""
        assert self.activation is IDENTITY, "an activation is of the whole sum"
        if not self.kernels.takes(x, self.weight, ""):
            return super().__call__(x)[None]
        parts: Tensor = self.kernels.linear_in_parts(x, self.weight, self.bias)
        return parts


class PackedLinear:
    """Weights reordered once into oneDNN's blocked layout: best for the few rows of a decode step.

    oneDNN applies what follows while the product is still in the cache. `python -m benchmarks.kernels` prints what both
    are worth.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: Activation = IDENTITY) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        # Looked up once: in a step of a hundred products finding the overload would be time.
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._product_and_sum = torch.ops.mkldnn._linear_pointwise.binary
        self.bias = bias
        self.post_op, self.algorithm = activation.post_op

    def __call__(self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        """[..., in] -> [..., out], in new memory."""
        product: Tensor
        if residual is None:
            product = self._product(x, self.packed, self.bias, self.post_op, [], self.algorithm)
        else:
            product = self._product_and_sum(x, residual, self.packed, self.bias, "add")
        return product


class InPanels(ABC):
    """A product on a CPU by kernels of ours: weights lie in panels of outputs, which are read in order.

    An exact GELU and a residual follow while the product is in the cache. A row's result does not depend on the rows
    beside it, to the last bit.
    """

    def __init__(self, kernels: ModuleType, bias: Tensor, outputs: int, activation: Activation) -> None:
        """`kernels`: `app.engine.cpu_kernels`. `outputs`: the panels', which are filled up."""
        self.kernels = kernels
        self.outputs = len(bias)
        self.bias = F.pad(bias, (0, outputs - len(bias)))
        self.gelu = activation.name == "gelu"
        self.activation = IDENTITY if self.gelu else activation

    def __call__(self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        """[..., in] fp32 -> [..., out] fp32."""
        whole = len(self.bias) == self.outputs
        out = None if workspace is None else workspace.take(*x.shape[:-1], len(self.bias))
        product = self._multiply(x, residual if whole else None, out)
        if not whole:  # few real networks' outputs have to be filled up
            product = product[..., : self.outputs].contiguous()
            product = product if residual is None else product.add_(residual)
        return self.activation.function(product)

    @abstractmethod
    def _multiply(self, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """All outputs of the panels, in `out` where it is given."""


class PanelLinear(InPanels):
    """In fp32. Weights that fp16 holds exactly, as those of a file in fp16, are kept in it: half the bytes to read."""

    # Of weights that fp16 does not hold.
    KEPT = torch.float32

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: Activation = IDENTITY,
        scale: Scale | None = None,
        *,
        kernels: ModuleType,
    ) -> None:
        self.panels: Tensor = kernels.pack(weight, torch.float16 if fits_float16(weight) else self.KEPT)
        super().__init__(kernels, bias, self.panels.shape[0] * self.panels.shape[2], activation)
        self.scale = scale or Scale(0, 1.0)

    def _multiply(self, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        scale = self.scale
        product: Tensor = self.kernels.multiply(
            x, self.panels, self.bias, residual, scale=scale.by, scaled=scale.outputs, gelu=self.gelu, out=out
        )
        return product


class Bfloat16PanelLinear(PanelLinear):
    """With weights in 16 bits: in bf16 where fp16 does not hold them. Rows and sums are in fp32."""

    KEPT = torch.bfloat16


class Int8PanelLinear(InPanels):
    """With weights in 8 bits, one scale an output; inputs are rounded as they come, one scale a row.

    To as many of 16 bits as sums of 32 bits take: 16 of 512 inputs, 13 of 3,072.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: Activation = IDENTITY, *, kernels: ModuleType) -> None:
        self.panels, self.weight_scales = kernels.pack_int8(weight)
        super().__init__(kernels, bias, len(self.weight_scales), activation)
        self.missing_inputs = weight.shape[1] % 2

    def _multiply(self, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        x = F.pad(x, (0, 1)) if self.missing_inputs else x
        product: Tensor = self.kernels.multiply_int8(
            x, self.panels, self.weight_scales, self.bias, residual, gelu=self.gelu, out=out
        )
        return product


def keeps_code(product: Linear) -> bool:
    """Whether code is compiled and kept for each number of rows: by oneDNN, for its products and some activations."""
    if isinstance(product, InPanels):
        return product.activation is not IDENTITY
    return not (isinstance(product, DenseLinear) and product.weight.is_cuda)


def fits_float16(weight: Tensor) -> bool:
    """Whether fp16 holds every number of [out, in] exactly, and all are finite."""

    def fits(part: Tensor) -> bool:
        half = part.half()
        return torch.equal(half.float(), part) and bool(half.isfinite().all())

    return fits(weight[:1]) and fits(weight)  # most that do not fit are known by the first row


class Int8Linear:
    """Weights in 8 bits or 7 by oneDNN, one scale an output; inputs are rounded to 8 bits, one scale a row.

    A scale of its own for each row, not one for the batch: the result of a sequence must not depend on its batch-mates.
    oneDNN multiplies unsigned by signed bytes, and has no fast kernel for signed inputs, so they are shifted by 128.
    What that adds to a product is 128 times the sum of an output's weights. It goes away with a bias: given a zero
    point, oneDNN would sum the weights in every call. How many bits weights have: see `largest_weight`.
    """

    SHIFT = 128
    LEAST = 1e-30  # a row of weights that are zeros is divided by it

    def __init__(self, weight: Tensor, bias: Tensor, activation: Activation = IDENTITY) -> None:
        largest, steps = weight.abs().amax(1).clamp(min=self.LEAST), largest_weight()  # [out]
        quantised = (weight * (steps / largest)[:, None]).round().to(torch.int8)
        self.scales = largest / (127 * steps)  # of the weights and, but for a row's own largest value, of the inputs
        self.bias = bias
        self.activation = activation
        self.packed = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._product = torch.ops.onednn.qlinear_pointwise.default
        self.zero_points = torch.zeros(len(quantised), dtype=torch.int32)
        self.shifted_back = quantised.sum(1, dtype=torch.float32) * self.scales * -self.SHIFT
        self.rounder = torch.tensor(1.5 * 2**23 + self.SHIFT)

    def __call__(self, x: Tensor, residual: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
        """[..., in] fp32 -> [..., out] fp32, in new memory."""
        shifted, largest = self._rounded(x.flatten(0, -2))
        product = self._product(
            shifted,
            1.0,
            0,
            self.packed,
            self.scales,
            self.zero_points,
            self.shifted_back,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        # A row of zeros has become any bytes: its product is multiplied by its largest value.
        scaled = torch.addcmul(self.bias, product, largest, out=product).view(*x.shape[:-1], -1)
        return self.activation.function(scaled) if residual is None else scaled.add_(residual)

    def _rounded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[M, in] fp32 to bytes shifted by 128, [M, in], and each row's largest value, [M, 1].

        In few operations, all of them vectorised. Added to 1.5 * 2^23, whose unit in the last place is 1, a number is
        rounded to an integer, which is then the lowest bits of the sum; `to` keeps its lowest byte.
        """
        held = rows.abs()
        largest = held.amax(1, keepdim=True)
        torch.mul(rows, largest.reciprocal(), out=held)  # into memory that the cache holds
        torch.add(self.rounder, held, alpha=127, out=held)
        return held.view(torch.int32).to(torch.uint8), largest


def largest_weight() -> int:
    """The largest byte that oneDNN's weights are rounded to: of 8 bits where products of bytes are added in 32 bits.

    Processors of x86 without VNNI instructions add two neighbours in 16 bits, where 2 * 255 * 127 overflows and
    2 * 255 * 64 does not. (What has VNNI for AVX2 alone counts as without: torch does not say whether oneDNN uses it.)
    Inputs keep their 8 bits: their largest values lie further from the rest than weights' do.
    """
    adds_in_16_bits = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported()
    return 64 if adds_in_16_bits else 127


def stacked(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weights and biases of several products of the same input, as one product."""
    return torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])


def choose_linear(
    device: torch.device, dtype: torch.dtype, int8: bool, few_rows: bool, rows: torch.dtype | None = None
) -> MakeLinear:
    """A device's forms: 8 bits if asked for; on a CPU panels, or packed for few rows; kernels on CUDA; or dense.

    What is faster where was measured; `app/engine/kernels.py` says where kernels of ours are.

    Args:
        device: where the product is.
        dtype: of the weights.
        int8: whether they are multiplied in 8 bits.
        few_rows: as in a step, or as of whole sources.
        rows: what comes in and goes out, where it is another dtype: see `rows_dtype`.
    """
    if int8:
        kernels = int8_kernels_for(device, few_rows)
        return MakeLinear(Int8Linear if kernels is None else partial(Int8PanelLinear, kernels=kernels))
    if few_rows and (kernels := kernels_for(device)) is not None:
        return MakeLinear(partial(FewRowsLinear, kernels=kernels))
    if (kernels := cpu_kernels_for(device, rows or dtype)) is not None:
        form = Bfloat16PanelLinear if dtype is torch.bfloat16 else PanelLinear
        return MakePanelLinear(partial(form, kernels=kernels))
    return MakeLinear(PackedLinear if device.type == "cpu" and few_rows and packs(dtype) else DenseLinear)


def rows_dtype(device: torch.device, dtype: torch.dtype, int8: bool) -> torch.dtype:
    """What rows are in, between products with weights of a dtype."""
    in_fp32 = int8 or (dtype is torch.bfloat16 and multiplies_bfloat16_in_fp32(device))
    return torch.float32 if in_fp32 else dtype


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype on this processor: in bfloat16 only with AVX-512 or later."""
    if dtype == torch.bfloat16:
        return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 and torch._C._has_mkldnn
