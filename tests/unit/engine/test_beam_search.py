"""Properties of the beam update itself, on made-up logits."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from app.engine import GenerationParams
from app.engine.beam_search import BeamState, advance_beams, advance_groups, advance_rows
from app.engine.slot_options import ActiveOptions, SlotOptions, Vocabulary
from app.engine.slot_tensors import SlotTensors
from app.engine.top_candidates import BLOCK

VOCAB, EOS, LENGTH = 11, 2, 9
VOCABULARY = Vocabulary(VOCAB, start_token_id=1, eos_token_id=EOS)
CPU = torch.device("cpu")


def slots(num_beams: int, params: GenerationParams) -> tuple[BeamState, SlotOptions]:
    """One started slot."""
    state, options = BeamState.empty(1, num_beams, LENGTH + 1, CPU), SlotOptions.empty(1, 4, LENGTH + 1, CPU)
    state.start(slice(0, 1), start_token_id=1)
    options.start([([1, 2], params)], 0, EOS)
    return state, options


def random_logits(seed: int, beams: int) -> torch.Tensor:
    """[LENGTH, 1, K, V], filled up as the model does."""
    logits = torch.randn(LENGTH, 1, beams, VOCAB, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(logits, (0, BLOCK - VOCAB), value=-torch.inf)


@pytest.mark.parametrize("seed", range(20))
def test_one_beam_equals_greedy(seed: int) -> None:
    outputs = []
    for advance in (advance_rows, advance_beams):
        logits = random_logits(seed, beams=1)
        state, options = slots(1, GenerationParams(max_new_tokens=LENGTH, early_stopping=True))
        for step in range(LENGTH):
            active = ActiveOptions(target=step + 1, source=2, ragged=False)
            if advance(state, logits[step], options, active, VOCABULARY).done.item():
                break
        length = state.finished_lengths[0, 0]
        outputs.append((state.finished_seqs[0, 0, :length].tolist(), state.finished_scores[0, 0].item()))
        logprobs = state.finished_token_logprobs[0, 0, 1:length]
        assert state.finished_scores[0, 0].item() == pytest.approx(logprobs.mean().item())
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][1] == pytest.approx(outputs[1][1])


def test_a_diversity_penalty_keeps_groups_from_saying_the_same() -> None:
    params = GenerationParams(num_beams=4, num_beam_groups=4, diversity_penalty=100.0)
    logits = random_logits(0, beams=1).expand(-1, -1, 4, -1).clone()
    (_, options), groups = slots(4, params), [slots(1, params)[0] for _ in range(4)]
    advance_groups(groups, logits[0], options, ActiveOptions(target=1, source=2, ragged=False), VOCABULARY)
    assert len({state.newest_tokens().item() for state in groups}) == 4


def test_a_free_slot_that_is_computed_along_stays_in_range() -> None:
    state, options = slots(2, GenerationParams(num_beams=2, max_new_tokens=2))
    state.free(0)
    options.free(0)
    for step in range(3 * LENGTH):
        advance_beams(
            state, random_logits(step, 2)[0], options, ActiveOptions(target=1, source=1, ragged=False), VOCABULARY
        )
    assert state.lengths.tolist() == [1]


def test_start_writes_every_field_of_a_slot() -> None:
    def started(value: int) -> list[SlotTensors]:
        state, options = BeamState.empty(2, 3, 5, CPU), SlotOptions.empty(2, 4, 5, CPU)
        for name, tensor in (*vars(state).items(), *vars(options).items()):
            tensor.fill_(bool(value) != (name == "can_improve") if tensor.dtype is torch.bool else value)
        state.start(slice(1, 2), start_token_id=1)
        options.start([([1, 5, 2], GenerationParams(num_beams=3, seed=4))], 1, EOS)
        return [state, options]

    for dirty, clean in zip(started(7), started(0), strict=True):
        for name, tensor in vars(dirty).items():
            torch.testing.assert_close(tensor[1], getattr(clean, name)[1], msg=name)


def test_rows_taken_from_the_host_are_what_was_written_there() -> None:
    ours, theirs = (SlotOptions.empty(4, 6, 9, torch.device("cpu")) for _ in range(2))
    requests = [
        ([1, 5, 2], GenerationParams(num_beams=3, seed=4)),
        ([3], GenerationParams(bad_words_ids=((4, 5),), seed=2**40 + 5)),
    ]
    ours.start(requests, 1, EOS)
    theirs.start(requests, 0, EOS)
    written = theirs.first(2)
    taker = SlotOptions.empty(4, 6, 9, torch.device("cpu"))
    taker.take(written, 1)
    for f in fields(taker):
        assert torch.equal(getattr(taker, f.name)[1:3], getattr(ours, f.name)[1:3]), f.name
        assert torch.equal(getattr(taker, f.name)[[0, 3]], getattr(ours, f.name)[[0, 3]]), f.name
