"""What the engine counts of its work, on the engine with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine import Engine, EngineConfig, GenerationParams
from app.engine.tally import Distribution, Tally
from tests.tiny import random_sources

PARAMS = GenerationParams(num_beams=3, max_new_tokens=6, min_new_tokens=6)


def test_a_value_on_a_bound_is_counted_at_it() -> None:
    distribution = Distribution([1, 2])
    for value in (0, 1, 1.5, 2, 2.5):
        distribution.observe(value)
    assert distribution.counts == [2, 2, 1]
    assert distribution.total == 7.0


@pytest.mark.parametrize(("slots", "bounds"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_the_last_bound_of_texts_is_all_slots(slots: int, bounds: list[int]) -> None:
    assert list(Tally(slots).step_texts.bounds) == bounds


def test_encodes_steps_texts_and_rows_are_counted_once_each(tiny_folder: Path) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig(max_num_seqs=2, max_encode_tokens=1))
    outputs = engine.generate(random_sources(4, seed=1), PARAMS)
    tokens = 4 * 6
    assert all(len(output.hypotheses[0].token_ids) == 6 for output in outputs)
    assert sum(engine.tally.encode_seconds.counts) == 4  # the budget lets one text in at a time
    assert engine.tally.step_texts.total == tokens
    assert engine.tally.rows == 3 * tokens
    assert sum(engine.tally.step_seconds.counts) == sum(engine.tally.step_texts.counts)
    assert engine.tally.step_texts.counts[2] == 0  # never more than the slots
    assert engine.tally.step_seconds.total > 0
    assert engine.tally.encode_seconds.total > 0


def test_what_failed_is_no_measurement(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig())

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(engine.runner, "step", fail)
    with pytest.raises(Exception, match="a decode step failed"):
        engine.generate(random_sources(1, seed=1), PARAMS)
    assert sum(engine.tally.encode_seconds.counts) == 1
    assert sum(engine.tally.step_seconds.counts) == engine.tally.rows == 0
