"""How many replicas: as many as it takes for the texts in all their engines to fill no more than the engines' slots.

Serve's own policy counts HTTP requests, of which one may hold 1 text or 32. An engine with more texts than slots makes
texts wait; one with fewer decodes for less than it could. Serve applies the delays and bounds of its configuration to
what stands here. Pickled by value into Serve's controller: imports nothing of this repository, nor torch.
"""

from __future__ import annotations

from typing import Any, Protocol

STAT = "precis_texts"  # what a replica records: texts that run or wait in its engine


class Context(Protocol):
    """What is read of Ray Serve's AutoscalingContext."""

    @property
    def aggregated_metrics(self) -> dict[str, dict[Any, float]] | None: ...  # noqa: D102
    @property
    def target_num_replicas(self) -> int: ...  # noqa: D102


class EngineQueuePolicy:
    """Replicas for the texts there are.

    Args:
        texts_per_replica: running and waiting in one engine, on average, when the number is right.
    """

    def __init__(self, texts_per_replica: float) -> None:
        if not texts_per_replica > 0:
            raise ValueError(f"texts_per_replica is {texts_per_replica}; it must be above 0")
        self.texts_per_replica = texts_per_replica

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """The number of replicas, not rounded, and no state of our own."""
        texts = (context.aggregated_metrics or {}).get(STAT)
        if not texts:  # nobody has reported yet, as after a restart of the controller: no reason to change anything
            return context.target_num_replicas, {}
        return sum(texts.values()) / self.texts_per_replica, {}
