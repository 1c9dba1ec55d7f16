"""BERT's family as encoder: BERT, RoBERTa, ELECTRA, DistilBERT.

Sources lie one behind the other, without padding: what acts on single tokens takes them all at once, and attention
takes source by source, so a batch costs what its tokens cost, and none sees another; on CUDA, where that would be many
small launches, attention alone takes them padded. Where products are oneDNN's the number of all tokens is filled up to
the next of a few, by a source that nobody reads: it compiles code for each number of rows, and keeps it. Equal to
transformers' modules in evaluation mode. Shapes: P tokens of all sources, H heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engine.attention import Padding, attend_sources
from app.engine.kernels import cpu_kernels_for
from app.engine.linear import Workspace, keeps_code
from app.engine.models.bert import BertConfig, EncoderLayer, layer_parts, read_embeddings
from app.engine.models.layers import Embeddings
from app.engine.models.weights import Weights


@dataclass(frozen=True)
class BertEncoder:
    """A stack of layers over embeddings."""

    config: BertConfig
    dtype: torch.dtype
    attention_dtype: torch.dtype
    embeddings: Embeddings
    layers: tuple[EncoderLayer, ...]
    kernels: ModuleType | None = None  # `app.engine.cpu_kernels` where attention is faster with them

    @classmethod
    def from_weights(cls, config: BertConfig, weights: Weights, attention_dtype: torch.dtype) -> BertEncoder:
        """Read what stands under `encoder.`; raises KeyError if a weight is missing."""
        stack = "transformer" if config.model_type == "distilbert" else "encoder"
        return cls(
            config=config,
            dtype=weights.dtype,
            attention_dtype=attention_dtype,
            embeddings=read_embeddings(weights, "encoder", config, weights.many_rows),
            layers=tuple(
                EncoderLayer(**layer_parts(weights, f"encoder.{stack}.layer.{i}", config, weights.many_rows))
                for i in range(config.num_hidden_layers)
            ),
            kernels=cpu_kernels_for(weights.device, weights.dtype),
        )

    @property
    def max_tokens(self) -> int:
        """Of one source."""
        return self.config.max_tokens

    def __call__(self, ids: Tensor, lengths: ListLike[int]) -> Tensor:
        """Ids [P] of all sources, and the length of each -> [P, E], or on some CPUs [`filled_up(P)`, E]."""
        if keeps_code(self.layers[0].intermediate) and (filling := filled_up(len(ids)) - len(ids)):
            ids, lengths = F.pad(ids, (0, filling)), [*lengths, filling]
        x = self.embeddings(ids, self._positions(ids, lengths))  # [P, E]
        heads = self.config.num_attention_heads
        attended_in = self.attention_dtype if self.kernels is None else self.dtype
        padding = Padding.of(lengths, ids.device) if ids.is_cuda else None
        wide, narrow = Workspace(), Workspace()  # no two that are needed at once lie in one
        for layer in self.layers:
            qkv = layer.qkv(x, workspace=wide).to(attended_in).view(len(ids), 3, heads, -1)  # [P, 3, H, D]
            attended = attend_sources(qkv, lengths, padding, self.kernels)  # [P, E]
            x = layer.attention_norm.of_sum(layer.attention_output, attended.to(self.dtype), x, narrow)
            x = layer.output_norm.of_sum(layer.output, layer.intermediate(x, workspace=wide), x, narrow)
        return x

    def _positions(self, ids: Tensor, lengths: ListLike[int]) -> Tensor:
        """[P]; RoBERTa counts tokens that are not padding, also where a text holds the padding token."""
        if self.config.padding_id is None:
            return torch.cat([torch.arange(n, device=ids.device) for n in lengths])
        counted = torch.split((ids != self.config.padding_id).long(), list(lengths))
        return torch.cat([source.cumsum(0) for source in counted]) - 1


def filled_up(rows: int) -> int:
    """The next multiple of 16, and from 512 on of a sixteenth of the power of two below: at most 6 % more."""
    step = max(16, (1 << rows.bit_length() - 1) // 16)
    return -(-rows // step) * step
