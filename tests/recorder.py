"""The logits that an engine's own steps saw, kept by sequence and prefix, so that a search can be held to them.

`with Recorder() as recorder:` around a run on the CPU, or on CUDA without graphs; a replayed graph calls nothing that
could be recorded. Copies a step's tensors and reads them only when asked. Knows of the engine that `_advance` gets, for
each group of beams, the sequences so far, and a row of logits for each beam; not what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from app.engine import Sequence
from app.engine.model_runner import DecodeBatch


@dataclass(frozen=True)
class Step:
    """One step of one batch, before anything is chosen."""

    sequences: list[Sequence]  # of slots 0..; slots behind them are free
    said: list[Tensor]  # of each group: [S, K / G, T]
    lengths: Tensor  # [S]
    logits: Tensor  # [S, K, V'] in fp32; V' as padded by the engine


class Recorder:
    """Everything that all engines of this process decode while it is entered."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._rows: dict[tuple[int, int], dict[tuple[int, ...], Tensor]] | None = None
        self._original: Callable[..., Any] = DecodeBatch._advance

    def __enter__(self) -> Recorder:
        def advance(batch: DecodeBatch, groups: list[Any], logits: Tensor, options: Any, active: Any) -> Any:
            self._steps.append(
                Step(
                    list(batch.sequences),
                    [group.live_seqs.clone() for group in groups],
                    groups[0].lengths.clone(),
                    logits.clone(),
                )
            )
            return self._original(batch, groups, logits, options, active)

        DecodeBatch._advance = advance  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        DecodeBatch._advance = self._original  # type: ignore[method-assign]

    def logits(self, sequence: Sequence) -> list[Mapping[tuple[int, ...], Tensor]]:
        """Of each group of beams: tokens so far, start token first -> [V'] on the CPU.

        Of equal rows of a group the first is kept.
        """
        if self._rows is None:
            self._rows = self._by_prefix()
        rows = self._rows
        return [rows.get((id(sequence), group), {}) for group in range(sequence.params.num_beam_groups)]

    def _by_prefix(self) -> dict[tuple[int, int], dict[tuple[int, ...], Tensor]]:
        rows: dict[tuple[int, int], dict[tuple[int, ...], Tensor]] = {}
        for step in self._steps:
            lengths, logits = step.lengths.tolist(), step.logits.cpu()
            for group, said in enumerate(step.said):
                width = said.shape[1]
                for slot, beams in enumerate(said[: len(step.sequences)].tolist()):
                    known = rows.setdefault((id(step.sequences[slot]), group), {})
                    for beam, tokens in enumerate(beams):
                        known.setdefault(tuple(tokens[: lengths[slot]]), logits[slot, group * width + beam])
        return rows
