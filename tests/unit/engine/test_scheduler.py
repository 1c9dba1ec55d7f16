"""Admission: order, slots, the encode budget, and those who left."""

from __future__ import annotations

from app.engine import EngineConfig, GenerationParams, Sequence
from app.engine.scheduler import Scheduler
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


def test_the_encode_budget_counts_padding() -> None:
    waiting = sequences(10, 10, 60, 10)
    made = scheduler(*waiting)
    assert [made.admit() for _ in range(2)] == [waiting[:2], waiting[2:3]]
    assert made.admit() == waiting[3:]


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
