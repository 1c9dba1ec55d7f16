"""What every decoder network has: its sizes, its cross-attention's keys and values, one step.

Pure functions of weights, inputs and caches that the caller owns. Does not know beams, options or requests; its rows
are whatever the runner puts there.

Shapes: S sequences, K rows (beams) of a sequence, P tokens of all sources, N source positions, T target positions, W
keys, L layers, H heads, D head size, E hidden size, V columns of logits: the vocabulary, filled up with columns of
-inf, at least one, to a multiple of BLOCK.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.engine.linear import Linear
from app.engine.step_cache import StepCache


class DecoderSizes(Protocol):
    """The part of a decoder's configuration that others go by."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def num_hidden_layers(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def head_size(self) -> int: ...  # noqa: D102
    @property
    def max_tokens(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Decoder(ABC):
    """A stack with self- and cross-attention, and its LM head."""

    dtype: torch.dtype  # of activations and, where they are not packed otherwise, of weights
    attention_dtype: torch.dtype  # of cached keys and values, and of what attends by torch's operations

    @property
    @abstractmethod
    def sizes(self) -> DecoderSizes:
        """Of the caches and of the vocabulary."""

    @property
    @abstractmethod
    def cross_key_values(self) -> list[Linear]:
        """Of each layer, from the encoder's output to its keys and values: as many rows as the sources have tokens."""

    @abstractmethod
    def decode(self, ids: Tensor, positions: Tensor, cache: StepCache) -> Tensor:
        """One step for every running row: write its key and value, attend, and score the vocabulary.

        Args:
            ids: [S, K], the newest token of each row.
            positions: [S], where that token stands; a sequence's beams are in step, sequences need not be.
            cache: of this step, for these positions.

        Returns:
            logits [S, K, V], in the model's dtype.
        """

    def cross(self, encoded: Tensor) -> Iterator[Tensor]:
        """The encoder's output [P, E] -> keys and values [P, 2, H, D] of each layer in turn, in `attention_dtype`."""
        shape = (len(encoded), 2, self.sizes.num_attention_heads, self.sizes.head_size)
        return (key_value(encoded).to(self.attention_dtype).view(shape) for key_value in self.cross_key_values)
