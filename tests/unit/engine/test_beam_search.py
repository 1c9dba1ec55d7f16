"""Properties of the beam update itself, on made-up logits."""

from __future__ import annotations

import pytest
import torch

from app.engine import GenerationParams
from app.engine.beam_search import ActiveOptions, BeamState, advance_beams, advance_greedy

VOCAB, EOS, LENGTH = 11, 2, 9


def plain_options(step: int) -> ActiveOptions:
    return ActiveOptions(longest=step + 1, repetition_penalty=False, largest_ngram=0, min_new_tokens=False)


@pytest.mark.parametrize("seed", range(20))
def test_one_beam_equals_greedy(seed: int) -> None:
    logits = torch.randn(LENGTH, 1, 1, VOCAB, generator=torch.Generator().manual_seed(seed))
    outputs = []
    for advance in (advance_greedy, advance_beams):
        state = BeamState.empty(1, 1, LENGTH + 1, torch.device("cpu"))
        state.start(0, GenerationParams(max_new_tokens=LENGTH, early_stopping=True), start_token_id=1)
        for step in range(LENGTH):
            if advance(state, logits[step], EOS, plain_options(step)).done.item():
                break
        outputs.append(
            (state.finished_seqs[0, 0, : state.finished_lengths[0, 0]].tolist(), state.finished_scores[0, 0].item())
        )
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][1] == pytest.approx(outputs[1][1])


def test_start_writes_every_field_of_a_slot() -> None:
    dirty, clean = (BeamState.empty(2, 3, 5, torch.device("cpu")) for _ in range(2))
    for name, tensor in vars(dirty).items():
        tensor.fill_(7 if tensor.dtype is not torch.bool else name != "can_improve")
    for state in (dirty, clean):
        state.start(1, GenerationParams(num_beams=3), start_token_id=1)
    for name, tensor in vars(dirty).items():
        torch.testing.assert_close(tensor[1], getattr(clean, name)[1], msg=name)


def test_growing_keeps_what_is_held() -> None:
    state = BeamState.empty(1, 2, 5, torch.device("cpu"))
    state.start(0, GenerationParams(num_beams=2, max_new_tokens=4), start_token_id=1)
    grown = state.grown(3)
    for name, tensor in vars(state).items():
        assert getattr(grown, name).shape[0] == 3
        torch.testing.assert_close(getattr(grown, name)[:1], tensor)
