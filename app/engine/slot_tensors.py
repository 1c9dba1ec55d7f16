"""Structs of tensors whose first dimension is the slot: taken in part, moved.

Knows only that first dimension. Does not know what any tensor means.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self


@dataclass
class SlotTensors:
    """Base of the dataclasses that hold decoding's state: every field is a tensor [C, ...], C slots."""

    def first(self, size: int) -> Self:
        """A view of the first `size` slots; writing to its tensors writes here."""
        return type(self)(**{f.name: getattr(self, f.name)[:size] for f in fields(self)})

    def take(self, rows: Self, first: int) -> None:
        """The slots from `first` on become what `rows` holds, on whatever device that is."""
        for f in fields(self):
            taken = getattr(rows, f.name)
            getattr(self, f.name)[first : first + len(taken)] = taken

    def move(self, source: int, target: int) -> None:
        """Slot `source`'s content becomes slot `target`'s."""
        for f in fields(self):
            tensor = getattr(self, f.name)
            tensor[target] = tensor[source]
