"""The choice of tokens in C against torch's compositions of it, and against what it says of ties and of no numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from app.engine import beam_search, cpu_kernels
from app.engine.beam_search import BeamState, _needed, advance_beams, advance_groups
from app.engine.cpu_kernels import choice
from app.engine.logits_processors import ban, completes_ngram
from app.engine.slot_options import LOOK_AHEAD, WHEN_FULL, ActiveOptions, SlotOptions, Vocabulary
from app.engine.top_candidates import BLOCK, Candidates, top_candidates
from tests.cpu_builds import needs_kernels, randoms

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

CPU = torch.device("cpu")


def scores_of(seed: int, slots: int, beams: int) -> Tensor:
    """Log-probabilities of 150 tokens; behind them are columns of none."""
    scores = randoms(slots, beams, 192, seed=seed).mul_(2)
    scores[..., 2] += 3  # the end token
    scores[..., 150:] = -torch.inf
    return scores


@pytest.mark.parametrize(("columns", "spread"), [(64, 3.0), (4160, 1.0), (30_592, 3.0), (30_592, 40.0)])
@torch.inference_mode()
def test_log_probabilities_are_those_in_fp64(columns: int, spread: float) -> None:
    """Of a group's part of the beams too, and with columns that are no tokens. In place where that is dense."""
    logits = randoms(2, 5, columns, seed=1) * spread
    logits[..., -40:] = -torch.inf
    for part in (logits[:, 1:3], logits):
        exact = part.double().log_softmax(-1)
        found = cpu_kernels.log_softmax(part)
        assert (found.data_ptr() == part.data_ptr()) == part.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=1e-6)  # units of the logits' last places


@torch.inference_mode()
def test_log_probabilities_of_a_row_do_not_depend_on_the_others() -> None:
    logits = randoms(3, 4, 4160, seed=1)
    alone = cpu_kernels.log_softmax(logits[1:2, 2:3].clone())
    assert torch.equal(cpu_kernels.log_softmax(logits)[1:2, 2:3], alone)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 63, 5000, 8191])
@torch.inference_mode()
def test_one_logit_that_is_no_number_makes_its_row_so(at: int, number: float) -> None:
    logits = randoms(1, 2, 8192, seed=1)
    logits[..., 5001:] = -torch.inf
    logits[0, 1, at] = number
    found = cpu_kernels.log_softmax(logits)
    assert found[0, 1].isnan().all()
    assert not found[0, 0].isnan().any()


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("beams", "k"), [(1, 2), (4, 8), (5, 10), (8, 16)])
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_candidates_are_chosen_as_torch_chooses_them(beams: int, k: int, slots: int, noise: bool) -> None:
    for seed in range(20):
        scores, beam_scores = scores_of(seed, slots, beams), randoms(slots, beams, seed=seed + 100)
        ranked = scores + randoms(slots, beams, scores.shape[2], seed=seed + 200) * 3 if noise else None
        expected = top_candidates(scores, beam_scores, k, 150, ranked)
        ours = cpu_kernels.top_candidates(scores, beam_scores, k, 150, ranked)
        for field in fields(Candidates):
            assert torch.equal(getattr(ours, field.name), getattr(expected, field.name)), field.name


def test_of_equal_candidates_the_first_are_chosen() -> None:
    scores = torch.zeros(1, 2, 256)
    ours = cpu_kernels.top_candidates(scores, torch.tensor([[0.0, 1.0]]), 4, 256)
    assert ours.rows.tolist() == [[1] * 4]
    assert ours.tokens.tolist() == [[0, 1, 2, 3]]
    assert ours.scores.tolist() == [[1.0] * 4]
    scores[0, 1] = torch.arange(256) // 100 * 0.5  # blocks of one, of two scores
    assert cpu_kernels.top_candidates(scores, torch.zeros(1, 2), 3, 256).tokens.tolist() == [[200, 201, 202]]


def test_candidates_that_cannot_be_are_tokens_and_beams_all_the_same() -> None:
    scores = torch.full((2, 4, 192), -torch.inf)
    scores[:, :, 7] = 0.0
    scores[1, 2] = torch.nan
    ours = cpu_kernels.top_candidates(scores, torch.zeros(2, 4), 8, 150)
    for chosen, rows in ((ours.tokens, 150), (ours.rows, 4)):
        assert ((chosen >= 0) & (chosen < rows)).all()
    assert len(set(zip(ours.rows[0].tolist(), ours.tokens[0].tolist(), strict=True))) == 8
    assert ours.rows[0, :4].tolist() == [0, 1, 2, 3]
    assert ours.tokens[0, :4].tolist() == [7] * 4


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("width", [1, 2, 33])
def test_ngrams_are_banned_as_torch_bans_them(width: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    said = torch.randint(4, (6, 3, 70), generator=draw)[:, :, :width]
    lengths = torch.tensor([20, 3, 33, 33, 1, 2]).clamp(max=width)
    sizes = torch.randint(5, (6,), generator=draw)
    sizes[4] = 1  # what has been said, whatever that is
    expected = scores_of(1, 6, 3)
    ours = expected.clone()
    ban(expected, said, completes_ngram(said, lengths, said, lengths, sizes, 4))
    cpu_kernels.ban_ngrams(ours, said, lengths, sizes)
    assert torch.equal(ours[..., :-1], expected[..., :-1])
    assert (ours[..., :150] == -torch.inf).any()


def options_of(rng: random.Random, slots: int, room: int) -> SlotOptions:
    options = SlotOptions.empty(slots + 2, 10, room, CPU)
    for slot in range(slots):
        options.max_new_tokens[slot] = rng.choice([3, room - 1])
        options.early_stopping[slot] = rng.choice([0, WHEN_FULL, LOOK_AHEAD])
        options.no_repeat_ngram_size[slot] = rng.choice([0, 2])
        penalty = rng.choice([1.0, 0.0, 2.0, -1.0])
        options.length_divisors[slot] = torch.arange(room).clamp(min=1).float() ** penalty
        options.diversity_penalty[slot] = 0.7
    return options


def assert_same(ours: BeamState, theirs: BeamState) -> None:
    for field in fields(BeamState):
        found, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in ("finished_seqs", "finished_token_logprobs", "finished_lengths"):  # others mean nothing
            found, expected = found[theirs.is_finished], expected[theirs.is_finished]
        assert torch.equal(found, expected), field.name


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", range(40))
def test_beams_advance_as_they_do_in_torch(seed: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same log-probabilities, whose last bits can decide, and the same of equal candidates."""
    monkeypatch.setattr(torch, "log_softmax", lambda logits, dim, out: cpu_kernels.log_softmax(logits))
    monkeypatch.setattr(beam_search, "top_candidates", lambda *given: cpu_kernels.top_candidates(*given[:4]))
    rng = random.Random(seed)
    beams, room, slots = rng.choice([2, 3, 4, 8]), rng.choice([9, 80]), rng.choice([1, 3, 7])
    options, vocabulary = options_of(rng, slots, room), Vocabulary(150, 1, 2)
    draw = torch.Generator().manual_seed(seed)
    theirs = [BeamState.empty(slots + 2, beams, room, CPU) for _ in range(groups)]
    said = rng.choice([0, 14, 30]) if room == 80 else 0  # steps that are behind them: parts of sequences are moved
    for state in theirs:
        state.start(slice(0, slots), 1)
        state.lengths += said
        state.live_seqs[:, :, 1 : said + 1] = torch.randint(150, (slots + 2, beams, said), generator=draw)
        state.live_token_logprobs[:, :, 1 : said + 1] = torch.rand(slots + 2, beams, said, generator=draw)
        state.is_running[slots - 1] = seed % 2  # one that is computed along
    ours = copy.deepcopy(theirs)
    for step in range(said, said + rng.choice([5, 8])):
        active = ActiveOptions(target=step + 1, source=1, ragged=False, largest_ngram=min(step + 2, 2))
        scores = scores_of(100 * seed + step, slots, beams * groups)
        results = []
        for states, chosen in ((theirs, None), (ours, cpu_kernels)):
            windows = [state.window(slots, step + 2) for state in states]
            given = scores.clone(), options.first(slots), active, vocabulary
            if groups > 1:
                results.append(advance_groups(windows, *given, chosen))
            else:
                results.append(advance_beams(windows[0], *given, kernels=chosen))
        assert torch.equal(results[0].done, results[1].done)
        assert torch.equal(_needed(results[0].parents), _needed(results[1].parents))
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)


def test_a_slot_that_is_not_computed_stays_as_it_is() -> None:
    state, options = BeamState.empty(3, 2, 9, CPU), options_of(random.Random(1), 1, 9)
    state.start(slice(0, 1), 1)
    before = copy.deepcopy(state)
    advance_beams(
        state.window(2, 2),
        scores_of(1, 2, 2),
        options.first(2),
        ActiveOptions(target=1, source=1, ragged=False),
        Vocabulary(150, 1, 2),
        kernels=cpu_kernels,
    )
    assert state.lengths.tolist() == [2, 1, 1]  # the second is computed along
    for field in fields(BeamState):
        assert torch.equal(getattr(state, field.name)[2], getattr(before, field.name)[2])


def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    scores, sums = scores_of(1, 2, 3), torch.zeros(2, 3)
    said, two = torch.zeros(2, 3, 5, dtype=torch.long), torch.ones(2, dtype=torch.long)
    state, options = BeamState.empty(2, 3, 9, CPU), options_of(random.Random(1), 2, 9)
    candidates = cpu_kernels.top_candidates(scores, sums, 6, 150)
    longer = BeamState.empty(2, 3, 12, CPU)
    refused: dict[str, Callable[[], object]] = {
        "logits is": lambda: cpu_kernels.log_softmax(scores[..., :100]),
        "scores is": lambda: cpu_kernels.top_candidates(scores[..., :100].contiguous(), sums, 2, 100),
        "beam_scores": lambda: cpu_kernels.top_candidates(scores, sums[:1], 6, 150),
        "ranked is": lambda: cpu_kernels.top_candidates(scores, sums, 6, 150, scores[..., :128].contiguous()),
        "10 candidates of 3 x 3": lambda: cpu_kernels.top_candidates(scores, sums, 10, 150),
        "as it lies in C": lambda: cpu_kernels.top_candidates(scores[:, [0]].expand(2, 3, 192), sums, 6, 150),
        "said is": lambda: cpu_kernels.ban_ngrams(scores, said[:, :2], two, two),
        "whose last dimension": lambda: cpu_kernels.ban_ngrams(scores, said[:, :, ::2], two, two),
        "sizes": lambda: cpu_kernels.ban_ngrams(scores, said, two, two[:1]),
        r"scores is \[2, 5\]": lambda: choice.keep(
            state, Candidates(*(getattr(candidates, f.name)[:, :5] for f in fields(Candidates))), options.first(2), 2
        ),
        "length_divisors": lambda: choice.keep(longer, candidates, options.first(2), 2),
        "0 tokens of 192": lambda: cpu_kernels.top_candidates(scores, sums, 6, 0),
        "max_new_tokens": lambda: choice.keep(state, candidates, options.first(1), 2),
        "can_improve": lambda: choice.keep(replace(state, can_improve=two[:1]), candidates, options.first(2), 2),
        "finished_lengths": lambda: choice.keep(replace(state, finished_lengths=two), candidates, options.first(2), 2),
        "a window of": lambda: choice.keep(
            replace(state, finished_seqs=torch.zeros(2, 3, 10, dtype=torch.long)[..., :9]),
            candidates,
            options.first(2),
            2,
        ),
    }
    for name, wrong in refused.items():
        with pytest.raises(ValueError, match=name):
            wrong()


def test_whether_scores_have_room_for_twice_as_many_candidates() -> None:
    assert cpu_kernels.can_choose(torch.zeros(2, 3, 2 * BLOCK))
    assert not cpu_kernels.can_choose(torch.zeros(2, 3, BLOCK))
    assert not cpu_kernels.can_choose(torch.zeros(2, 3, 4 * BLOCK)[..., ::2])
    assert not cpu_kernels.can_choose(torch.zeros(2, 3, 2 * BLOCK), torch.zeros(2, 3, 4 * BLOCK)[..., ::2])
