"""The engine against its oracle: `generate`, fp32, one text at a time, over random tiny models, inputs and options.

Sequences of one case run in one engine with mixed options, few slots and small encode budgets, so that what is compared
is in-flight batching, not a loop over single texts.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from app.engine import Engine, EngineConfig, Sequence
from tests.tiny import oracle, random_params, random_sources, save, tiny_model

CASES_PER_MODEL = 20


@pytest.mark.parametrize("seed", range(25))
def test_tokens_and_scores_equal_generate(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    sharpness = rng.choice([1.0, 3.0, 6.0, 12.0])
    model = tiny_model(seed, sharpness)
    config = EngineConfig(max_num_seqs=rng.choice([1, 3, 16]), max_encode_tokens=rng.choice([1, 64, 4096]))
    engine = Engine.from_folder(save(model, tmp_path), config)
    sequences = [Sequence(tuple(ids), random_params(rng)) for ids in random_sources(CASES_PER_MODEL, seed)]
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    for sequence in sequences:
        assert sequence.output is not None, sequence.error
        ours = [list(h.token_ids) for h in sequence.output.hypotheses]
        expected, scores = oracle(model, sequence.source_ids, sequence.params)
        if ours != expected:
            # A float tie, if an fp64 copy of the model sides with us; anything else is a mismatch.
            judge = tiny_model(seed, sharpness, torch.float64)
            assert ours == oracle(judge, sequence.source_ids, sequence.params)[0], sequence.params
        elif scores is not None:
            assert [h.score for h in sequence.output.hypotheses] == pytest.approx(scores, rel=1e-4, abs=1e-5)
        for hypothesis in sequence.output.hypotheses:
            assert hypothesis.finish_reason == ("eos" if hypothesis.token_ids[-1] == 2 else "length")
            assert len(hypothesis.token_ids) <= sequence.params.max_new_tokens
