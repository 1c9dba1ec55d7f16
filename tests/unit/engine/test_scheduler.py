"""Admission: order, slots, the encode budget, priorities, deadlines, and those who left."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from app.engine import EngineConfig, GenerationParams, Priority, Sequence
from app.engine.scheduler import BATCH_EVERY, Scheduler
from app.engine.sequence import SequenceStatus


def sequences(*lengths: int) -> list[Sequence]:
    return [Sequence((1,) * length, GenerationParams()) for length in lengths]


def scheduler(*waiting: Sequence, max_num_seqs: int = 8, max_encode_tokens: int = 100) -> Scheduler:
    made = Scheduler(EngineConfig(max_num_seqs=max_num_seqs, max_encode_tokens=max_encode_tokens))
    for sequence in waiting:
        made.add(sequence)
    return made


def test_first_come_first_served_within_the_slots() -> None:
    waiting = sequences(10, 10, 10)
    made = scheduler(*waiting, max_num_seqs=2)
    assert made.admit() == waiting[:2]
    assert made.admit() == []
    made.retire(waiting[0])
    assert made.admit() == waiting[2:]


def test_the_encode_budget_bounds_a_step_but_never_starves_a_long_text() -> None:
    waiting = sequences(60, 60, 500, 10)
    made = scheduler(*waiting)
    assert [made.admit() for _ in range(4)] == [waiting[:1], waiting[1:2], waiting[2:3], waiting[3:]]


def test_the_aborted_leave_queue_and_slots() -> None:
    running, waiting = sequences(10, 10)
    made = scheduler(running, waiting, max_num_seqs=1)
    made.admit()
    made.abort(running)
    made.abort(waiting)
    assert made.remove_aborted() == [running]
    assert not made.has_work


def test_a_finished_sequence_cannot_be_aborted() -> None:
    (sequence,) = sequences(10)
    made = scheduler(sequence)
    made.admit()
    sequence.finish(())
    made.abort(sequence)
    assert sequence.status is SequenceStatus.FINISHED


def of_priority(priority: Priority, count: int) -> list[Sequence]:
    return [Sequence((1,), GenerationParams(), priority=priority) for _ in range(count)]


def test_interactive_goes_before_batch_and_batch_is_not_starved() -> None:
    batch, interactive = of_priority(Priority.BATCH, 3), of_priority(Priority.INTERACTIVE, 3 * BATCH_EVERY)
    made = scheduler(*batch, *interactive, max_num_seqs=1)
    order = []
    while made.has_work:
        (sequence,) = made.admit()
        order.append(sequence)
        made.retire(sequence)
    assert [s for s in order if s.priority is Priority.BATCH] == batch
    assert [s for s in order if s.priority is Priority.INTERACTIVE] == interactive
    assert [order.index(s) + 1 for s in batch] == [BATCH_EVERY, 2 * BATCH_EVERY, 3 * BATCH_EVERY]


def test_batch_takes_what_nobody_else_wants() -> None:
    batch = of_priority(Priority.BATCH, 3)
    assert scheduler(*batch).admit() == batch


def late(seconds: float) -> Sequence:
    return Sequence((1,), GenerationParams(), deadline=time.monotonic() + seconds)


def test_a_sequence_whose_deadline_is_over_is_never_admitted() -> None:
    over, there_is_time, patient = late(-1), late(60), Sequence((1,), GenerationParams())
    made = scheduler(over, there_is_time, patient)
    assert made.remove_late() == [over]
    assert over.is_late
    assert made.admit() == [there_is_time, patient]
    assert math.isinf(patient.deadline)


def after_five_seconds(params: GenerationParams, source: tuple[int, ...] = (1,)) -> Scheduler:
    """A scheduler that has seen one sequence, of these options, which took five seconds; nothing runs."""
    slow = Sequence(source, params)
    made = scheduler(slow)
    made.admit()
    slow.encoded_at = slow.admitted_at = time.monotonic() - 5
    slow.finish(())
    made.retire(slow)
    return made


def test_a_deadline_before_the_fastest_could_be_done_is_late_while_others_run() -> None:
    made = after_five_seconds(GenerationParams())
    made.add(Sequence((1,), GenerationParams()))
    made.admit()
    hopeless, enough = late(1), late(60)
    for sequence in (hopeless, enough):
        made.add(sequence)
    assert made.remove_late() == [hopeless]
    assert hopeless.is_late
    assert made.admit() == [enough]


def test_where_nothing_runs_a_near_deadline_is_tried() -> None:
    made = after_five_seconds(GenerationParams())
    near, over = late(1), late(-1)
    for sequence in (near, over):
        made.add(sequence)
    assert made.remove_late() == [over]
    assert made.admit() == [near]


@pytest.mark.parametrize(("tokens", "asked"), [(1, {"num_beams": 8}), (1, {"max_new_tokens": 500}), (99, {})])
def test_nobody_is_held_to_what_one_took_that_asked_for_more(tokens: int, asked: dict[str, Any]) -> None:
    source, params = (1,) * tokens, GenerationParams(**asked)
    made = after_five_seconds(params, source)
    made.add(Sequence((1,), GenerationParams()))
    made.admit()
    less, as_much = late(1), Sequence(source, params, deadline=time.monotonic() + 1)
    for sequence in (less, as_much):
        made.add(sequence)
    assert made.remove_late() == [as_much]
