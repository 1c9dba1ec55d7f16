"""Every step takes effect once, whether run, recorded or replayed. CUDA is a fake here: what is tested is the order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine import cuda_graphs
from app.engine.cuda_graphs import GraphRunner, StepRunner, step_runner


class FakeGraph:
    """Holds what ran while it was recorded."""

    recording: FakeGraph | None = None

    def __init__(self) -> None:
        self.kernels: list[Counter] = []

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel.count += 1


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        """Nothing runs at the same time here."""


class Counter:
    """A step that counts how often the device did it."""

    def __init__(self, can_be_recorded: bool = True) -> None:
        self.count = 0
        self.launched = 0
        self.can_be_recorded = can_be_recorded

    def __call__(self) -> Tensor:
        self.launched += 1
        if FakeGraph.recording is None:
            self.count += 1
        elif self.can_be_recorded:
            FakeGraph.recording.kernels.append(self)
        else:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(2, 1)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> GraphRunner:
    @contextmanager
    def record(graph: FakeGraph, **_: Any) -> Iterator[None]:
        FakeGraph.recording = graph
        try:
            yield
        finally:
            FakeGraph.recording = None

    fakes = {
        "graph": record,
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "graph_pool_handle": object,
        "device": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return GraphRunner(torch.device("cuda"))


def test_a_step_is_run_then_recorded_then_replayed(runner: GraphRunner) -> None:
    step = Counter()
    for runs in range(1, 6):
        runner.run("key", step)
        assert step.count == runs
    assert step.launched == 2


def test_steps_of_other_keys_have_recordings_of_their_own(runner: GraphRunner) -> None:
    one, two = Counter(), Counter()
    for _ in range(4):
        runner.run("one", one)
        runner.run("two", two)
    assert (one.count, two.count) == (4, 4)


def test_a_step_that_cannot_be_recorded_runs_all_the_same(
    runner: GraphRunner, caplog: pytest.LogCaptureFixture
) -> None:
    step = Counter(can_be_recorded=False)
    for runs in range(1, 6):
        runner.run("key", step)
        assert step.count == runs
    assert [record.message for record in caplog.records] == [
        "a decode step could not be recorded; it runs unrecorded from now on"
    ]


def test_the_oldest_recording_makes_room(runner: GraphRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    steps = {key: Counter() for key in ("one", "two", "three")}
    for key in ("one", "one", "two", "two", "three", "three", "one"):
        runner.run(key, steps[key])
    assert [step.count for step in steps.values()] == [3, 2, 2]
    assert steps["one"].launched == 3  # run, recorded, forgotten, run


def test_only_cuda_records() -> None:
    assert type(step_runner(torch.device("cpu"), enabled=True)) is StepRunner
    assert type(step_runner(torch.device("cuda"), enabled=False)) is StepRunner
