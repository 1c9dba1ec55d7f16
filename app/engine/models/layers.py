"""The small parts that several networks have. Shapes: E hidden size, V vocabulary, [...] any leading dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.linear import FewRowsLinear, Linear, Workspace
from app.engine.top_candidates import BLOCK


@dataclass(frozen=True)
class LayerNorm:
    """Scale and shift over the last dimension [E]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def of_sum(self, linear: Linear, x: Tensor, residual: Tensor, workspace: Workspace | None = None) -> Tensor:
        """Of linear(x) + residual, in new memory: what ends every part of a layer whose norms come last.

        Args:
            workspace: where the sum may lie.
        """
        return self(linear(x, residual, workspace))


@dataclass(frozen=True)
class KernelLayerNorm(LayerNorm):
    """Where a norm and the sums before it are one kernel, `app.engine.triton_kernels`' `add_norm`."""

    kernels: ModuleType

    def of_sum(self, linear: Linear, x: Tensor, residual: Tensor, workspace: Workspace | None = None) -> Tensor:
        """See `LayerNorm`."""
        product = linear.in_parts(x) if isinstance(linear, FewRowsLinear) else linear(x)
        normed: Tensor = self.kernels.add_norm(product, residual, self.weight, self.bias, self.eps)
        return normed


@dataclass(frozen=True)
class Embeddings:
    """Word and position vectors; the one token type that is used is already added to the positions.

    Attributes:
        padding_id: RoBERTa's: this token stands at no position, and the positions' first row is its own.
        projection: ELECTRA's, from the size of its embeddings to that of its layers.
    """

    word: Tensor  # [V, E]
    position: Tensor  # [N, E]
    norm: LayerNorm
    padding_id: int | None = None
    projection: Linear | None = None

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and positions of one shape [...] -> [..., E]."""
        if self.padding_id is not None:
            positions = (positions + 1).masked_fill(ids == self.padding_id, 0)
        x = self.norm(F.embedding(ids, self.word) + F.embedding(positions, self.position))
        return x if self.projection is None else self.projection(x)


@dataclass(frozen=True)
class LMHead:
    """Hidden state to logits: dense, activation, norm, then the (tied) word embeddings."""

    transform: Linear  # with the activation
    norm: LayerNorm
    decoder: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return self.decoder(self.norm(self.transform(x)))


def filled_up(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [V, E] and biases [V] of an LM head, up to the next multiple of BLOCK: no token, a score of -inf."""
    missing = BLOCK - weight.shape[0] % BLOCK
    return F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=-torch.inf)
