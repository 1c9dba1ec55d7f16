"""Any searches together, arriving and leaving at random: each says what it says alone, and streams nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from app.engine import Engine, EngineConfig, GenerationParams, Sequence, kernels
from app.engine.sequence import SequenceStatus
from tests.tiny import EOS, random_diverse_params, random_params, random_shape, random_sources, save, tiny_model

SOURCES, LEAVERS = 10, 4


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
@pytest.mark.parametrize("seed", range(4))
def test_each_says_in_any_company_what_it_says_alone(seed: int, decoder: str, tmp_path: Path) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, decoder=decoder)
    folder = save(tiny_model(seed, rng.choice([2.0, 6.0, 10.0]), shape=shape), tmp_path)
    engine, apart = (Engine.from_folder(folder, EngineConfig(max_num_seqs=slots)) for slots in (3, 1))
    sources = random_sources(SOURCES, seed, longest=40, vocab=shape.vocab)

    def sequence(source: list[int]) -> Sequence:
        params = random_search(rng, shape.vocab, engine.max_output_tokens)
        return Sequence(tuple(source), params, streams=rng.random() < 0.7)

    stayers, leavers = [sequence(s) for s in sources], [sequence(rng.choice(sources)) for _ in range(LEAVERS)]
    to_come = [*stayers, *leavers]
    rng.shuffle(to_come)
    streamed: dict[int, tuple[int, ...]] = {}
    while to_come or engine.scheduler.has_work:
        if to_come and rng.random() < 0.5:
            engine.add(to_come.pop())
        if rng.random() < 0.4:
            engine.scheduler.abort(rng.choice(leavers))
        engine.step()
        for s in stayers:
            before = streamed.get(s.id, ())
            assert s.certain_ids[: len(before)] == before
            streamed[s.id] = s.certain_ids
    assert any(s.status is SequenceStatus.ABORTED for s in leavers)
    assert any(streamed.values())
    for s in stayers:
        alone = Sequence(s.source_ids, s.params)
        apart.add(alone)
        while apart.scheduler.has_work:
            apart.step()
        assert said(s) == said(alone), s.params
        if s.output is not None:
            assert s.output.hypotheses[0].token_ids[: len(s.certain_ids)] == s.certain_ids


def said(sequence: Sequence) -> object:
    """Every token, and with kernels of ours every score and log-probability, to the last bit; or why there is none."""
    if sequence.output is None:
        return sequence.error
    hypotheses = sequence.output.hypotheses
    return hypotheses if kernels.cpu_kernels() is not None else [hypothesis.token_ids for hypothesis in hypotheses]


def random_search(rng: random.Random, vocab: int, longest: int) -> GenerationParams:
    """Of any kind, samples too."""
    if rng.random() < 0.3:
        beams = rng.choice([1, 1, 2, 4])
        return GenerationParams(
            num_beams=beams,
            num_return_sequences=rng.randint(1, 4 if beams == 1 else beams),
            do_sample=True,
            max_new_tokens=min(longest, rng.choice([1, 5, 20])),
            min_new_tokens=rng.choice([0, 3]),
            top_k=rng.choice([0, 1, 2, 5, 50]),
            top_p=rng.choice([1.0, 0.9, 0.3, 1e-6]),
            temperature=rng.choice([1.0, 0.5, 3.0]),
            seed=rng.randrange(2**64),
            no_repeat_ngram_size=rng.choice([0, 1, 2]),
            forced_eos_token_id=rng.choice([None, EOS]),
        )
    params = random_diverse_params(rng, vocab) if rng.random() < 0.3 else random_params(rng, vocab)
    return replace(params, max_new_tokens=min(params.max_new_tokens, longest))
