"""A decode step as one launch: recorded once for each shape as a CUDA graph, then replayed.

A step of 12 layers is hundreds of kernels of a few microseconds; launching them one by one costs more than running
them. What is recorded reads and writes tensors at fixed addresses: the caches and states, which never grow on CUDA. Off
CUDA a step is run as it is, through the same call. Does not know what a step does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Step = Callable[[], Tensor]
# Shapes times options in use; the oldest recording goes first. One takes about as much memory as a step's activations.
MAX_GRAPHS = 256


class StepRunner:
    """Runs a step directly."""

    def run(self, key: Hashable, step: Step) -> Tensor:
        """Run `step`; `key` tells steps that differ in shape or in code from one another."""
        return step()


class GraphRunner(StepRunner):
    """Runs a step the first time, records it the second time, and replays it from then on.

    All recordings share one memory pool: they never run at the same time, and what one leaves behind is either at a
    fixed address of the caller's or read before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[Hashable, Recording | None] = {}  # None: run once, or impossible to record
        self._impossible: set[Hashable] = set()
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(self, key: Hashable, step: Step) -> Tensor:
        """The step's result; the next run overwrites it."""
        with torch.cuda.device(self._device):
            if key in self._impossible:
                return step()
            if key not in self._seen:
                self._forget_the_oldest()
                self._seen[key] = None
                return self._first_run(step)
            recording = self._seen[key] or self._record(key, step)
            if recording is None:
                return step()
            recording.graph.replay()
            return recording.result

    def _first_run(self, step: Step) -> Tensor:
        # Libraries allocate workspaces and choose kernels on first use, which a recording may not contain.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self, key: Hashable, step: Step) -> Recording | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are what a recording must not contain.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = step()
        except Exception:
            # Nothing has run: the step is still to be done, and steps like it go on without a recording.
            logger.exception("a decode step could not be recorded; it runs unrecorded from now on")
            self._impossible.add(key)
            return None
        recording = self._seen[key] = Recording(graph, result)
        return recording

    def _forget_the_oldest(self) -> None:
        while len(self._seen) >= MAX_GRAPHS:
            del self._seen[next(iter(self._seen))]


@dataclass(frozen=True)
class Recording:
    """A graph and the tensor that each replay writes."""

    graph: torch.cuda.CUDAGraph
    result: Tensor


def step_runner(device: torch.device, enabled: bool) -> StepRunner:
    """Graphs on CUDA, nothing in between elsewhere."""
    return GraphRunner(device) if enabled and device.type == "cuda" else StepRunner()
