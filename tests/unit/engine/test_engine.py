"""The invariants of decoding: company, slots, arrival, leavers and failures change nothing for the others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine import Engine, EngineConfig, GenerationParams, Sequence
from app.engine.kv_cache import KVCache
from app.engine.model_runner import DecodeBatch, SearchKind
from app.engine.models.encoder_decoder import EncoderDecoder
from app.engine.sequence import SequenceStatus
from tests.tiny import EOS, START, random_sources

PARAMS = GenerationParams(num_beams=4, max_new_tokens=24, min_new_tokens=6, no_repeat_ngram_size=2)
LONG = GenerationParams(num_beams=4, max_new_tokens=40, min_new_tokens=40)


def new_engine(folder: Path, **config: int) -> Engine:
    return Engine.from_folder(folder, EngineConfig(**{"max_num_seqs": 4, **config}))  # type: ignore[arg-type]


def run(engine: Engine, *sequences: Sequence) -> list[tuple[int, ...]]:
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    return [tokens(sequence) for sequence in sequences]


def beams_of_four(engine: Engine) -> DecodeBatch:
    return engine.runner.batches[SearchKind.of(PARAMS)]


def tokens(sequence: Sequence) -> tuple[int, ...]:
    assert sequence.output is not None, sequence.error
    return sequence.output.hypotheses[0].token_ids


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    return new_engine(tiny_folder)


@pytest.fixture
def alone(tiny_folder: Path) -> list[tuple[int, ...]]:
    """What each of eight sources gives in an engine of its own."""
    return [run(new_engine(tiny_folder), Sequence(tuple(ids), PARAMS))[0] for ids in random_sources(8, seed=1)]


def test_company_and_slot_do_not_matter(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    sources = random_sources(8, seed=1)
    assert len(set(alone)) > 1
    assert run(engine, *(Sequence(tuple(ids), PARAMS) for ids in sources)) == alone
    backwards = [Sequence(tuple(ids), PARAMS) for ids in reversed(sources)]
    assert run(engine, *backwards) == alone[::-1]


def test_arrival_step_does_not_matter(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    sequences = [Sequence(tuple(ids), PARAMS) for ids in random_sources(8, seed=1)]
    for sequence in sequences:
        engine.add(sequence)
        engine.step()
    while engine.scheduler.has_work:
        engine.step()
    assert [tokens(sequence) for sequence in sequences] == alone


def test_neighbours_of_other_widths_do_not_matter(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    sources = random_sources(8, seed=1)
    wanted = [Sequence(tuple(ids), PARAMS) for ids in sources[:2]]
    others = [
        Sequence(tuple(ids), GenerationParams(num_beams=k, max_new_tokens=30))
        for k, ids in zip((1, 8), sources, strict=False)
    ]
    assert run(engine, *wanted, *others)[:2] == alone[:2]


def test_cancelled_neighbour_leaves_at_the_next_step_and_changes_nothing(
    engine: Engine, alone: list[tuple[int, ...]]
) -> None:
    sources = random_sources(8, seed=1)
    leaver, stayer = Sequence(tuple(sources[5]), LONG), Sequence(tuple(sources[0]), PARAMS)
    engine.add(leaver)
    engine.add(stayer)
    engine.step()
    engine.scheduler.abort(leaver)
    engine.step()
    assert leaver not in beams_of_four(engine).sequences
    while engine.scheduler.has_work:
        engine.step()
    assert tokens(stayer) == alone[0]
    assert leaver.output is None


def test_reused_slot_leaves_no_trace(tiny_folder: Path, alone: list[tuple[int, ...]]) -> None:
    engine = new_engine(tiny_folder, max_num_seqs=1)
    sources = random_sources(8, seed=1)
    longest = Sequence(tuple(sorted(sources, key=len)[-1]), LONG)
    assert run(engine, longest, *(Sequence(tuple(ids), PARAMS) for ids in sources))[1:] == alone


def test_scores_that_are_not_numbers_fail_one_sequence_only(tiny_folder: Path, alone: list[tuple[int, ...]]) -> None:
    engine = new_engine(tiny_folder, max_num_seqs=2)
    sources = random_sources(8, seed=1)
    victim, neighbour = Sequence(tuple(sources[5]), PARAMS), Sequence(tuple(sources[0]), PARAMS)
    engine.add(victim)
    engine.add(neighbour)
    engine.step()
    batch = beams_of_four(engine)
    with torch.inference_mode():
        batch.cache.cross_values[:, batch.sequences.index(victim)] = torch.nan
    while engine.scheduler.has_work:
        engine.step()
    assert victim.error == "the model's scores for this text are not numbers"
    assert tokens(neighbour) == alone[0]
    # The poisoned slot serves its next occupants, shorter sources among them, as if nothing had been.
    assert run(engine, *(Sequence(tuple(ids), PARAMS) for ids in sources)) == alone


@pytest.mark.parametrize(
    "params",
    [
        GenerationParams(max_new_tokens=20, min_new_tokens=20),
        GenerationParams(max_new_tokens=20, forced_bos_token_id=9),
        GenerationParams(max_new_tokens=20, do_sample=True, seed=1),
    ],
)
def test_no_option_hides_scores_that_are_not_numbers(tiny_folder: Path, params: GenerationParams) -> None:
    engine = new_engine(tiny_folder)
    victim = Sequence(tuple(random_sources(1, seed=1)[0]), params)
    engine.add(victim)
    engine._encode(engine.scheduler.admit())
    batch = engine.runner.batches[SearchKind.of(params)]
    with torch.inference_mode():
        batch.cache.cross_values.fill_(torch.nan)
    engine.step()
    assert victim.error == "the model's scores for this text are not numbers"


@pytest.mark.parametrize(
    "params",
    [
        GenerationParams(max_new_tokens=20, min_new_tokens=20),
        GenerationParams(max_new_tokens=20, do_sample=True, num_return_sequences=2, seed=1),
        GenerationParams(max_new_tokens=20, num_beams=4),
    ],
)
def test_one_infinite_score_is_no_number_and_nothing_of_it_is_said(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, params: GenerationParams
) -> None:
    """As when fp16 overflows."""
    engine = new_engine(tiny_folder)
    model = engine.runner.checkpoint.model
    decode = type(model).decode

    def overflown(self: EncoderDecoder, *args: Any) -> Tensor:
        logits = decode(self, *args)
        logits[..., 33] = torch.inf
        return logits

    victim = Sequence(tuple(random_sources(1, seed=1)[0]), params, streams=True)
    engine.add(victim)
    engine.step()
    before = victim.certain_ids
    monkeypatch.setattr(type(model), "decode", overflown)
    engine.step()
    assert victim.error == "the model's scores for this text are not numbers"
    assert victim.certain_ids == before


def test_a_refused_source_leaves_nothing_behind(tiny_folder: Path) -> None:
    engine, (source,) = new_engine(tiny_folder), random_sources(1, seed=1)
    with pytest.raises(ValueError, match="source tokens: there are none"):
        engine.generate([source, []], PARAMS)
    assert not engine.scheduler.has_work
    other, seen = Sequence(tuple(source), PARAMS), list[int]()
    engine.add(other)
    assert len(engine.generate([source], PARAMS, seen.append)) == 1
    assert seen == [1]
    assert other.output


@pytest.mark.parametrize("beams", [1, 4])
def test_options_that_leave_nothing_are_said_so(tiny_folder: Path, beams: int) -> None:
    engine = new_engine(tiny_folder)
    everything = tuple(range(engine.info.vocab_size))
    sequence = Sequence((START, EOS), GenerationParams(num_beams=beams, max_new_tokens=5, suppress_tokens=everything))
    engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert sequence.error == "no hypothesis could be finished with these options"


def test_encoder_error_fails_the_culprit_only(
    engine: Engine, alone: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    sources = random_sources(8, seed=1)
    culprit = Sequence((10_000_000,), PARAMS)  # no such token: the embedding lookup raises
    good = [Sequence(tuple(ids), PARAMS) for ids in sources[:2]]
    for sequence in (good[0], culprit, good[1]):
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert culprit.error == "encoding failed: IndexError"
    assert [tokens(sequence) for sequence in good] == alone[:2]
    assert "10000000" not in caplog.messages[0]


def test_what_could_not_be_written_for_all_is_written_one_by_one(
    tiny_folder: Path, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds of search, which had their slots already, beside one that runs; nothing of the attempt stays."""
    engine, write, calls = new_engine(tiny_folder), KVCache.write_cross, itertools.count()
    sources = [tuple(ids) for ids in random_sources(8, seed=1)]
    running, *joining = [Sequence(ids, PARAMS) for ids in sources[:3]]
    greedy = Sequence(sources[3], GenerationParams(max_new_tokens=9))
    expected = run(new_engine(tiny_folder), Sequence(sources[3], greedy.params))
    engine.add(running)
    engine.step()

    def once_out_of_memory(cache: KVCache, layer: int, first: int, kv: torch.Tensor, own: list[slice]) -> None:
        call = next(calls)
        if call == 3:
            raise MemoryError
        write(cache, layer, first, kv.fill_(torch.nan) if call < 3 else kv, own)

    monkeypatch.setattr(KVCache, "write_cross", once_out_of_memory)
    assert run(engine, *joining, greedy) == alone[1:3] + expected
    assert tokens(running) == alone[0]
    assert all(batch.cache.cross_values.isfinite().all() for batch in engine.runner.batches.values())


def test_failed_decode_step_fails_the_running_and_the_queue_goes_on(
    tiny_folder: Path, alone: list[tuple[int, ...]]
) -> None:
    engine = new_engine(tiny_folder, max_num_seqs=2)
    sequences = [Sequence(tuple(ids), PARAMS) for ids in random_sources(8, seed=1)]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    beams_of_four(engine).options.source_lengths = torch.zeros(0, dtype=torch.int64)  # a runner whose state is torn
    while engine.scheduler.has_work:
        engine.step()
    failed = [sequence for sequence in sequences if sequence.error]
    assert len(failed) == 2
    assert all(sequence.error and sequence.error.startswith("a decode step failed") for sequence in failed)
    assert [tokens(sequence) for sequence in sequences[2:]] == alone[2:]


@pytest.mark.parametrize(
    ("source", "params", "message"),
    [
        ([1] * 65, PARAMS, "source tokens: 65 is over the limit of 64"),
        ([1], GenerationParams(num_beams=9), "num_beams, or samples: 9 is over the limit of 8"),
        ([1], GenerationParams(max_new_tokens=41), "max_new_tokens: 41 is over the limit of 40"),
        (
            [1],
            GenerationParams(do_sample=True, num_return_sequences=9),
            "num_beams, or samples: 9 is over the limit of 8",
        ),
        ([1], GenerationParams(max_new_tokens=9, suppress_tokens=(10**6,)), "token ids: 1000000 is over the limit of"),
        ([], PARAMS, "source tokens: there are none"),
    ],
)
def test_beyond_the_limits_is_refused(
    engine: Engine, source: list[int], params: GenerationParams, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.add(Sequence(tuple(source), params))


def test_a_short_one_sent_last_returns_before_a_long_one_sent_first(engine: Engine) -> None:
    sources = random_sources(2, seed=1)
    first, last = Sequence(tuple(sources[0]), LONG), Sequence(tuple(sources[1]), GenerationParams(max_new_tokens=2))
    engine.add(first)
    engine.step()
    engine.add(last)
    while last.status is not SequenceStatus.FINISHED:
        engine.step()
    assert first.status is SequenceStatus.RUNNING


def test_progress_reports_every_source_once(engine: Engine) -> None:
    seen: list[int] = []
    engine.generate(random_sources(6, seed=1), PARAMS, on_finished=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 6
