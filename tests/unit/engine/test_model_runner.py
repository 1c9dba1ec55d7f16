"""Sizes and forms of a step change its cost, not its result: fixed sizes, free slots computed along, int8."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine import Engine, EngineConfig, GenerationParams, Sequence, kernels
from app.engine.buckets import Buckets, round_up
from app.engine.checkpoint import load_checkpoint
from app.engine.kv_cache import KVCache
from app.engine.model_runner import MAX_BATCHES, ModelRunner
from app.engine.slot_options import ActiveOptions
from tests.cpu_builds import needs_kernels
from tests.tiny import TinyShape, random_sources, save, tiny_model

SEARCHES = [
    GenerationParams(max_new_tokens=20),
    GenerationParams(num_beams=4, num_return_sequences=2, max_new_tokens=12, no_repeat_ngram_size=2),
    GenerationParams(num_beams=4, max_new_tokens=30, min_new_tokens=25, length_penalty=-1.0),
    GenerationParams(num_beams=4, num_beam_groups=2, diversity_penalty=0.7, max_new_tokens=15),
    GenerationParams(do_sample=True, num_return_sequences=3, seed=5, max_new_tokens=18),
    GenerationParams(do_sample=True, num_beams=3, seed=6, top_p=0.8, max_new_tokens=18),
    GenerationParams(num_beams=8, max_new_tokens=9, forced_bos_token_id=9, suppress_tokens=(11, 12)),
]


def outputs(
    folder: Path, buckets: Buckets | None = None, dtype: str = "float32", together: bool = False
) -> list[list[tuple[int, ...]]]:
    """Three texts for each kind of search, in flight together; every hypothesis's tokens."""
    engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=5, dtype=dtype))
    if buckets is not None:
        engine.runner = ModelRunner(engine.runner.checkpoint, engine.config, engine.max_output_tokens, buckets)
    engine.runner.sources_together = together
    sequences = [
        Sequence(tuple(ids), SEARCHES[i % len(SEARCHES)])
        for i, ids in enumerate(random_sources(3 * len(SEARCHES), seed=2))
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    found = []
    for sequence in sequences:
        assert sequence.output is not None, sequence.error
        found.append([hypothesis.token_ids for hypothesis in sequence.output.hypotheses])
    return found


@pytest.mark.parametrize("buckets", [None, Buckets.doubling(5, 40, 64)], ids=["exact sizes", "fixed sizes"])
def test_sources_written_together_say_what_they_say_one_by_one(tiny_folder: Path, buckets: Buckets | None) -> None:
    assert outputs(tiny_folder, buckets, together=True) == outputs(tiny_folder)


@pytest.mark.parametrize(
    "buckets",
    [
        Buckets.doubling(5, 40, 64),
        Buckets(slots=(5,), target=(40,), source=(64,)),
        Buckets.multiples(40, 64),
        Buckets(target=tuple(range(1, 41)), source=tuple(range(1, 65)), compact=True),
    ],
    ids=["doubling", "one size", "compact, multiples", "compact, exact"],
)
def test_steps_of_fixed_sizes_say_what_steps_of_exact_sizes_say(tiny_folder: Path, buckets: Buckets) -> None:
    assert outputs(tiny_folder, buckets) == outputs(tiny_folder)


def test_samples_and_groups_return_what_was_asked_for(tiny_folder: Path) -> None:
    counts = [len(hypotheses) for hypotheses in outputs(tiny_folder)]
    assert counts == [SEARCHES[i % len(SEARCHES)].num_return_sequences for i in range(len(counts))]


@needs_kernels
def test_scores_of_rows_in_bf16_are_chosen_from_by_kernels_as_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a library multiplies in bf16, and caches are its own: scores are in fp32 all the same."""
    monkeypatch.setattr(kernels, "_bfloat16_is_faster", lambda: True)
    folder = save(tiny_model(seed=3, shape=TinyShape(vocab=256)), tmp_path)  # enough for kernels to choose from
    engine = Engine.from_folder(folder, EngineConfig(dtype="bfloat16"))
    engine.generate(random_sources(1, seed=1), SEARCHES[1])
    (batch,) = engine.runner.batches.values()
    assert batch.kernels is kernels.cpu_kernels()
    assert engine.runner.checkpoint.model.dtype is torch.bfloat16
    ours = outputs(folder, dtype="bfloat16")
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    assert outputs(folder, dtype="bfloat16") == ours


def test_int8_does_not_depend_on_the_company(tiny_folder: Path) -> None:
    config = EngineConfig(dtype="int8")
    params = GenerationParams(num_beams=4, max_new_tokens=20)
    sources = random_sources(6, seed=4)
    together = Engine.from_folder(tiny_folder, config).generate(sources, params)
    alone = [Engine.from_folder(tiny_folder, config).generate([ids], params)[0] for ids in sources]
    assert [o.hypotheses[0].token_ids for o in together] == [o.hypotheses[0].token_ids for o in alone]


def test_kinds_of_search_that_nobody_uses_give_their_memory_back(tiny_folder: Path) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig())
    for beams in range(1, MAX_BATCHES + 3):
        engine.generate(random_sources(1, seed=1), GenerationParams(num_beams=beams, max_new_tokens=3))
    assert [kind.rows for kind in engine.runner.batches] == list(range(3, MAX_BATCHES + 3))


def test_kinds_of_search_that_run_are_never_dropped(tiny_folder: Path) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig())
    (source,) = random_sources(1, seed=1)
    sequences = [
        Sequence(tuple(source), GenerationParams(num_beams=beams, max_new_tokens=3, min_new_tokens=3))
        for beams in range(1, MAX_BATCHES + 3)
    ]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    assert len(engine.runner.batches) == len(sequences)


def test_after_many_kinds_at_once_only_the_last_few_keep_their_memory(tiny_folder: Path) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig(max_num_beams=16))
    (source,) = random_sources(1, seed=1)
    for beams in range(1, MAX_BATCHES + 5):
        engine.add(Sequence(tuple(source), GenerationParams(num_beams=beams, max_new_tokens=3)))
    while engine.scheduler.has_work:
        engine.step()
    assert [kind.rows for kind in engine.runner.batches] == list(range(5, MAX_BATCHES + 5))


@pytest.mark.parametrize("out_of_memory", [torch.OutOfMemoryError, OSError])
def test_a_new_kind_takes_the_memory_of_idle_ones_where_there_is_no_other(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, out_of_memory: type[Exception]
) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig())
    held: list[weakref.ref[KVCache]] = []
    made = KVCache.__init__

    def with_room_for_two(cache: KVCache, *args: Any) -> None:
        gc.collect()
        if sum(reference() is not None for reference in held) == 2:
            raise out_of_memory("no room")
        made(cache, *args)
        held.append(weakref.ref(cache))

    monkeypatch.setattr(KVCache, "__init__", with_room_for_two)
    (source,) = random_sources(1, seed=1)
    for beams in (1, 2, 3):
        assert engine.generate([source], GenerationParams(num_beams=beams, max_new_tokens=3))
    assert [kind.rows for kind in engine.runner.batches] == [3]
    running = [Sequence(tuple(source), GenerationParams(num_beams=beams, max_new_tokens=9)) for beams in (4, 5)]
    refused = Sequence(tuple(source), GenerationParams(num_beams=6, max_new_tokens=3))
    for sequence in (*running, refused):
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert refused.error == f"encoding failed: {out_of_memory.__name__}"
    assert [sequence.error for sequence in running] == [None, None]


def test_caches_take_the_memory_that_is_said(tiny_folder: Path) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig(max_num_seqs=3))
    params = GenerationParams(num_beams=4, max_new_tokens=5)
    engine.generate(random_sources(6, seed=4), params)
    (batch,) = engine.runner.batches.values()
    tensors = (batch.cache.self_kv, batch.cache.cross_keys, batch.cache.cross_values)
    assert batch.cache.capacity == 3
    assert sum(tensor.nbytes for tensor in tensors) == engine.runner.cache_bytes(4)


def test_a_step_reads_no_more_than_the_longest_running_target(tiny_folder: Path) -> None:
    engine = Engine.from_folder(tiny_folder, EngineConfig())
    params = GenerationParams(num_beams=2, max_new_tokens=30, min_new_tokens=30)
    engine.add(Sequence(tuple(random_sources(1, seed=1)[0]), params))
    engine.step()
    (batch,) = engine.runner.batches.values()
    # What lies behind it may be anything: it is not read.
    with torch.inference_mode():
        batch.cache.self_kv[:, :, :, :, 2:] = torch.nan
    engine.step()
    assert len(batch.sequences) == 1


def test_compact_caches_have_no_gaps_in_what_a_step_reads(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where oneDNN reads them."""
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    engine = Engine.from_folder(tiny_folder, EngineConfig(max_num_seqs=5, dtype="bfloat16"))
    for ids, new_tokens in zip(random_sources(5, seed=3), (3, 20, 20, 35, 35), strict=True):
        params = GenerationParams(num_beams=2, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        engine.add(Sequence(tuple(ids), params))
    engine.step()
    (batch,) = engine.runner.batches.values()
    rooms = []
    while batch.sequences:
        size, cache = len(batch.sequences), batch.cache
        rooms.append(cache.self_kv.shape[4])
        assert rooms[-1] >= max(batch.lengths) - 1
        assert cache.cross_keys.shape[3] >= max(len(s.source_ids) for s in batch.sequences)
        assert cache.self_kv[0, 0, :size].is_contiguous()
        assert cache.cross_keys[0, :size].is_contiguous()
        engine.step()
    assert rooms == sorted(rooms)  # no target leaves here while a longer one is to come
    assert (rooms[0], rooms[-1]) == (16, 40)


def test_sizes_are_rounded_up_to_the_next_allowed() -> None:
    buckets = Buckets.doubling(max_num_seqs=48, max_target=127, max_source=512)
    assert buckets.slots == (1, 2, 4, 8, 16, 32, 48)
    assert buckets.target == (32, 64, 127)
    assert [round_up(n, buckets.slots) for n in (1, 3, 33, 48)] == [1, 4, 48, 48]
    assert round_up(77, ()) == 77


def test_a_text_that_is_no_number_harms_nobody_when_caches_are_laid_out_anew(tiny_folder: Path) -> None:
    """Its keys and values lay where other slots lie now."""
    engine = Engine.from_folder(tiny_folder, EngineConfig(max_num_seqs=4, dtype="bfloat16"))
    params = GenerationParams(num_beams=2, max_new_tokens=12, min_new_tokens=12)
    short, long = [1, 7, 8, 2], [1, *range(5, 55), 2]
    engine.runner.buckets = Buckets(target=tuple(range(1, 41)), source=tuple(range(1, 65)), compact=True)
    sequences = [Sequence(tuple(short), params) for _ in range(3)]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    (batch,) = engine.runner.batches.values()
    with torch.inference_mode():
        batch.cache.cross_keys[:, 2] = torch.nan
        batch.cache.cross_values[:, 2] = torch.nan
    joined = Sequence(tuple(long), params)
    engine.add(joined)
    while engine.scheduler.has_work:
        engine.step()
    assert [sequence.output is None for sequence in (*sequences, joined)] == [False, False, True, False]


@pytest.mark.parametrize("params", SEARCHES)
@torch.inference_mode()
def test_a_step_asks_for_nothing_that_the_device_computed(tiny_folder: Path, params: GenerationParams) -> None:
    """What a CUDA graph may not do either: tensors of the meta device have shapes and no numbers."""
    checkpoint = load_checkpoint(tiny_folder, "meta", "float32")
    runner = ModelRunner(checkpoint, EngineConfig(max_num_seqs=5), 40, Buckets.doubling(5, 40, 64))
    runner.admit([Sequence(tuple(ids), params) for ids in random_sources(3, seed=2)])
    (batch,) = runner.batches.values()
    every_option = ActiveOptions(
        target=32,
        source=64,
        ragged=True,
        repetition_penalty=True,
        largest_ngram=3,
        largest_encoder_ngram=2,
        bad_words=True,
        min_new_tokens=True,
        forced_bos=True,
        forced_eos=True,
        suppress_tokens=True,
        begin_suppress_tokens=True,
        do_sample=params.do_sample,
        filter_width=64 if params.do_sample else 0,
    )
    flags = batch._decode(4, every_option)
    assert flags.shape == (2, 4)
    assert flags.is_meta
