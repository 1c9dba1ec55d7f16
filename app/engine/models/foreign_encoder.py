"""Encoders that the engine has no network of its own for: transformers' module, imported when one is loaded.

The only place of `app` that imports transformers, and only inside a function: a server of other checkpoints does not
need it installed. Sources go through without padding, those of one length together, so no mask is needed: FNet has
none (its Fourier transform mixes every position of what it is given, padding too), and the others are told nothing that
they would have to ignore. Known architectures by name only; code that a checkpoint brings is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.engine.models.limits import max_tokens
from app.engine.models.weights import Weights

FOREIGN_ENCODERS = ("albert", "deberta-v2", "fnet", "modernbert", "mpnet")
# Of an encoder's section in config.json: where classes come from, which is settled here.
_NOT_SETTINGS = ("model_type", "auto_map", "architectures", "dtype", "_attn_implementation")


@dataclass(frozen=True)
class ForeignEncoder:
    """A module that takes `input_ids` [B, N] and gives `last_hidden_state` [B, N, E]."""

    module: nn.Module
    dtype: torch.dtype  # of what it gives; torch's Fourier transform has no bfloat16, so FNet computes in fp32
    max_tokens: int

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Weights) -> ForeignEncoder:
        """Read what stands under `encoder.`.

        Raises:
            ValueError: transformers is not installed, or the weights are not those of the architecture.
            KeyError: a weight or the number of positions is missing.
        """
        kind = config["model_type"]
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError as error:
            raise ValueError(
                f"model_type is {kind!r}, which runs through transformers, and it is not installed: "
                "pip install 'precis[train]'"
            ) from error
        settings = {key: value for key, value in config.items() if key not in _NOT_SETTINGS}
        if kind == "fnet":
            settings["use_tpu_fourier_optimizations"] = False  # a matrix of one length, where the transform takes any
        module = AutoModel.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32).eval()
        own = {n.removeprefix("encoder."): t.float() for n, t in weights.tensors.items() if n.startswith("encoder.")}
        missing = [name for name in module.state_dict() if name not in own]
        if missing:
            raise KeyError(f"encoder.{missing[0]}")
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"the weights are not those of {kind}: {error}") from error
        module.requires_grad_(False)
        module.to(device=weights.device, dtype=torch.float32 if kind == "fnet" else weights.dtype)
        return cls(module, weights.dtype, max_tokens(config))

    def __call__(self, ids: Tensor, lengths: ListLike[int]) -> Tensor:
        """Ids [P] of all sources, and the length of each -> [P, E]."""
        sources = torch.split(ids, list(lengths))
        of_length: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            of_length.setdefault(length, []).append(index)
        encoded: list[Tensor] = [ids] * len(sources)
        for alike in of_length.values():
            states = self.module(input_ids=torch.stack([sources[i] for i in alike])).last_hidden_state
            for index, state in zip(alike, states, strict=True):
                encoded[index] = state
        return torch.cat(encoded).to(self.dtype)
