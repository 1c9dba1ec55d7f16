"""What rounding to fp32 may do to a model's scores: the fp64 model, whose every result is rounded at random.

Monte Carlo arithmetic (Parker 1997, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic"). Each
run is about as far off as some fp32 program might be, and many runs show how far apart such programs lie. Does not know
what the scores are used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import EncoderDecoderModel

from app.engine import GenerationParams
from tests.reference.scores import NextScores, next_scores

FP32_ROUNDING = 2.0**-24  # half a unit in the last place of numbers just above 1


# What computes nothing, or nothing that is not exact.
EXACT = {
    f"aten::{name}"
    for name in (
        *("embedding", "index", "index_select", "gather", "scatter", "clone", "_to_copy", "cat", "stack", "where"),
        *("masked_fill", "constant_pad_nd", "relu", "max", "amax", "neg", "abs", "full_like", "scalar_tensor"),
    )
}


class RandomRounding(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """While entered, results in fp64 are off by up to `rounding`, relatively, and sums of products term by term.

    A matrix product takes its terms in a random order, and each partial sum is rounded: processors' kernels differ in
    just that. Other operations that add up (a norm, a softmax) are rounded once, less than a program may; operations in
    place are not. A rounding is 1.4 times that to the nearest, in the mean of squares.
    """

    def __init__(self, seed: int, rounding: float = FP32_ROUNDING) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor has this
        self.generator = torch.Generator().manual_seed(seed)
        self.rounding = rounding

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """One operation of torch; those that are made of others come back as these."""
        with self:
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return self._product(*args)
        if func is torch.ops.aten.addmm.default:
            bias, left, right = args
            return self._rounded(bias + self._product(left, right))
        result = func(*args, **(kwargs or {}))
        is_a_view = any(returned.alias_info is not None for returned in func._schema.returns)
        return result if is_a_view or func._schema.name in EXACT else tree_map(self._rounded, result)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """[..., M, I] times [..., I, N]."""
        if left.dtype != torch.float64:
            return left @ right
        order = torch.randperm(left.shape[-1], generator=self.generator)
        terms = self._rounded(left[..., order, None] * right[..., None, order, :])  # [..., M, I, N]
        sums = terms.cumsum(-2)
        errors = (self._rounded(sums) - sums)[..., 1:, :]  # the first is no sum
        return sums[..., -1, :] + errors.sum(-2)

    def _rounded(self, numbers: Any) -> Any:
        if not isinstance(numbers, Tensor) or numbers.dtype != torch.float64:
            return numbers
        draws = torch.rand(numbers.shape, generator=self.generator, dtype=numbers.dtype)
        return numbers * (1 + self.rounding * (2 * draws - 1))


def rounded_at_random(
    model: EncoderDecoderModel,
    source: Sequence[int],
    params: GenerationParams,
    seed: int,
    rounding: float = FP32_ROUNDING,
) -> NextScores:
    """One run of `next_scores`; `model` is in fp64, with weights that fp32 holds."""
    mode = RandomRounding(seed, rounding)

    @contextmanager
    def rounding_at_random() -> Iterator[None]:
        # Attention in parts, which are rounded, and not as one operation.
        with sdpa_kernel(SDPBackend.MATH), mode:
            yield

    with rounding_at_random():
        scores = next_scores(model, source, params)
    return rounding_at_random()(scores)
