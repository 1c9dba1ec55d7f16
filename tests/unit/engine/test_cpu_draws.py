"""Draws in C against torch's composition of them, whose random words theirs are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.engine import cpu_kernels
from app.engine.philox import gumbel_noise
from app.engine.top_candidates import BLOCK
from tests.cpu_builds import needs_kernels, randoms

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

SLOTS, ROWS, COLUMNS = 3, 2, 30_528


class Case:
    """Scores of some sequences, and what is drawn from them by: few tokens of the second, one of the third."""

    def __init__(self, seed: int = 0) -> None:
        self.scores = randoms(SLOTS, ROWS, COLUMNS, seed=seed) * 3
        self.scores[..., -6:] = -torch.inf
        self.temperatures = torch.tensor([1.0, 0.7, 1.9])
        warm = self.scores / self.temperatures[:, None, None]
        self.floors = torch.stack(
            [torch.full((ROWS,), -torch.inf), warm[1].topk(50).values[:, -1], warm[2].topk(1).values[:, -1]]
        )
        self.warped = warm.masked_fill(warm < self.floors[..., None], -torch.inf)
        self.seeds = torch.tensor([[7, 0], [2**32 - 1, 2**31 + 5], [1, 2**32 - 1]])
        self.steps = torch.tensor([1, 40, 127])

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of both functions."""
        return self.scores.clone(), self.temperatures, self.floors, self.seeds, self.steps

    def alone(self, slot: int) -> tuple[Tensor, ...]:
        """The same of one sequence."""
        return tuple(x[slot : slot + 1].clone() for x in self.given)


def test_noise_is_that_of_torch(threads: int) -> None:
    case = Case()
    scores, temperatures, _, seeds, steps = case.given
    nothing = torch.full((SLOTS, ROWS), -torch.inf)
    ranked = cpu_kernels.perturb(torch.zeros_like(scores), torch.ones_like(temperatures), nothing, seeds, steps)
    # Rounding of a logarithm of what is close to 1; its numbers are from -3 to 17.
    torch.testing.assert_close(ranked, gumbel_noise(seeds, steps, ROWS, COLUMNS), rtol=1e-6, atol=1e-6)


def test_noise_is_only_of_what_can_be_drawn() -> None:
    case = Case()
    scores, *rest = case.given
    ranked = cpu_kernels.perturb(scores, *rest)
    assert torch.equal(scores, case.warped)
    assert torch.equal(ranked == -torch.inf, case.warped == -torch.inf)
    expected = case.warped + gumbel_noise(case.seeds, case.steps, ROWS, COLUMNS)
    torch.testing.assert_close(ranked, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_greatest_is_drawn(seed: int, threads: int) -> None:
    case = Case(seed)
    case.steps += seed
    tokens, logprobs = cpu_kernels.draw(*case.given)
    assert torch.equal(tokens, cpu_kernels.perturb(*case.given).argmax(-1))
    exact = case.warped.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=2e-6)
    assert logprobs[2].tolist() == [0.0, 0.0]


def test_a_sequence_is_drawn_from_alone_as_in_company() -> None:
    case = Case()
    together = cpu_kernels.draw(*case.given)
    for slot in range(SLOTS):
        alone = cpu_kernels.draw(*case.alone(slot))
        assert all(torch.equal(mine[0], all_[slot]) for mine, all_ in zip(alone, together, strict=True))
        assert torch.equal(cpu_kernels.perturb(*case.alone(slot))[0], cpu_kernels.perturb(*case.given)[slot])


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.3, 0.9, 0.9999, 1 - 2**-24])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_floors_leave_the_least_set_with_so_much_mass(share: float, spread: float, kept: int, threads: int) -> None:
    scores = randoms(SLOTS, ROWS, COLUMNS, seed=2) * spread
    scores[..., -6:] = -torch.inf
    temperatures, shares = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([share, share, 1.0])
    warm = scores / temperatures[:, None, None]
    before = torch.full((SLOTS, ROWS), -torch.inf)
    before[1] = warm[1].topk(1000).values[:, -1]
    floors = before.clone()
    cpu_kernels.raise_floors(scores, temperatures, shares, floors, kept)
    assert torch.equal(floors[2], before[2])  # top-p 1 leaves a row alone
    left = warm.double().masked_fill(warm < before[..., None], -torch.inf)[:2].softmax(-1)
    above, inside = (
        (left * (part(warm[:2], floors[:2, :, None]))).sum(-1) for part in (torch.greater, torch.greater_equal)
    )
    counts = (warm[:2] >= floors[:2, :, None]).sum(-1)
    assert ((inside >= share - 1e-6) & ((above < share + 1e-6) | (counts == kept))).all()
    assert (counts >= kept).all()
    assert (warm[:2] == floors[:2, :, None]).any(-1).all()  # each is a score


def test_tokens_that_are_equally_likely_stay_together() -> None:
    scores = torch.full((1, 1, 128), -torch.inf)
    scores[..., :5] = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    floors = torch.full((1, 1), -torch.inf)
    cpu_kernels.raise_floors(scores, torch.ones(1), torch.tensor([0.85]), floors, 1)
    assert floors.item() == 1.0
    cpu_kernels.raise_floors(scores, torch.ones(1), torch.tensor([0.3]), floors, 1)
    assert floors.item() == 3.0
    cpu_kernels.raise_floors(scores, torch.ones(1), torch.tensor([0.3]), floors.fill_(-torch.inf), 2)
    assert floors.item() == 2.0


def test_a_floor_is_never_lowered() -> None:
    """To keep two where only one is above it."""
    scores = torch.full((1, 1, 128), -torch.inf)
    scores[..., :3] = torch.tensor([3.0, 2.0, 1.0])
    floors = torch.full((1, 1), 3.0)
    cpu_kernels.raise_floors(scores, torch.ones(1), torch.tensor([0.5]), floors, 2)
    assert floors.item() == 3.0


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number_raises_no_other_floor(number: float, whole: bool, kept: int) -> None:
    case = Case()
    shares = torch.full((SLOTS,), 0.5)
    expected, floors = case.floors.clone(), case.floors.clone()
    cpu_kernels.raise_floors(case.scores, case.temperatures, shares, expected, kept)
    case.scores[0, 1, slice(None) if whole else 4321] = number
    cpu_kernels.raise_floors(case.scores, case.temperatures, shares, floors, kept)
    assert torch.equal(floors[1:], expected[1:])
    assert floors[0, 0] == expected[0, 0] > -torch.inf


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_said_to_be_none(number: float) -> None:
    """And nothing of it reaches another row. -inf: a row in which everything is forbidden."""
    case = Case()
    if number == -torch.inf:
        case.scores[0, 1] = number
    else:
        case.scores[0, 1, 4321] = number
    tokens, logprobs = cpu_kernels.draw(*case.given)
    assert logprobs[0, 1].isnan()
    assert not logprobs[0, 0].isnan()
    assert not logprobs[1:].isnan().any()
    assert ((tokens >= 0) & (tokens < COLUMNS)).all()


def test_which_scores_are_taken() -> None:
    assert cpu_kernels.can_draw(torch.zeros(2, 3, 2 * BLOCK))
    assert not cpu_kernels.can_draw(torch.zeros(2, 3, 2 * BLOCK + 1))
    assert not cpu_kernels.can_draw(torch.zeros(2, 3, 2 * BLOCK, dtype=torch.bfloat16))
    assert not cpu_kernels.can_draw(torch.zeros(2, 3, 4 * BLOCK)[..., ::2])


def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    scores, temperatures, floors, seeds, steps = Case().given
    wrong: dict[str, tuple[Tensor, ...]] = {
        "scores is": (scores[..., :100].contiguous(), temperatures, floors, seeds, steps),
        "temperatures is": (scores, temperatures[:1], floors, seeds, steps),
        "floors is": (scores, temperatures, floors[:, :1], seeds, steps),
        "seeds is": (scores, temperatures, floors, seeds[:, :1], steps),
        "steps is": (scores, temperatures, floors, seeds, steps[:2]),
        "float64": (scores, temperatures.double(), floors, seeds, steps),
        "as it lies in C": (scores[:, :1].expand(SLOTS, ROWS, COLUMNS), temperatures, floors, seeds, steps),
    }
    calls: list[Callable[..., object]] = [cpu_kernels.draw, cpu_kernels.perturb]
    with pytest.raises(ValueError, match="3 tokens that stay"):
        cpu_kernels.raise_floors(scores, temperatures, temperatures, floors, 3)
    with pytest.raises(ValueError, match="shares is"):
        cpu_kernels.raise_floors(scores, temperatures, temperatures[:1], floors, 1)
    for name, given in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=name):
                call(*given)
