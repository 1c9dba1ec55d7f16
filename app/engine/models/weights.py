"""A checkpoint's weights in the forms that networks are made of: on the device, in its dtype, packed or not.

Knows names only as they are asked for. Does not know networks, nor the files that the weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.kernels import kernels_for
from app.engine.linear import MakeLinear, choose_linear
from app.engine.models.layers import KernelLayerNorm, LayerNorm


@dataclass(frozen=True)
class Weights:
    """A state dict of EncoderDecoderModel; asking for a name that it lacks is a KeyError.

    Attributes:
        dtype: of rows, and of weights that are not packed.
        packed: the packed ones', where it is another.
        int8: whether they are multiplied in 8 bits.
    """

    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    packed: torch.dtype | None = None
    int8: bool = False

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def many_rows(self) -> MakeLinear:
        """Makes products of many rows: what acts on the tokens of whole sources."""
        return self._products(few_rows=False)

    @property
    def few_rows(self) -> MakeLinear:
        """Makes products of few rows: what acts on a step's newest tokens."""
        return self._products(few_rows=True)

    def _products(self, few_rows: bool) -> MakeLinear:
        return choose_linear(self.device, self.packed or self.dtype, self.int8, few_rows, self.dtype)

    def get(self, name: str) -> Tensor:
        """One weight, in memory of its own: a view would keep the whole file mapped, with what is packed elsewhere."""
        return self.tensors[name].to(device=self.device, dtype=self.dtype, copy=True)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias [out] of a linear layer."""
        return self.get(f"{name}.weight"), self.get(f"{name}.bias")

    def norm(self, name: str, eps: float) -> LayerNorm:
        """A layer norm."""
        kernels = kernels_for(self.device)
        pair = self.pair(name)
        return LayerNorm(*pair, eps) if kernels is None else KernelLayerNorm(*pair, eps, kernels)
