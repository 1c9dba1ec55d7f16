"""Diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424) in lists and loops: the oracle for groups of beams.

transformers 5 has none. Inside a group everything is its `_beam_search`, with the group as an independent search of
`num_beams / num_beam_groups` beams; with one group this is that search, which a test holds it to. Sums are exact to
a float of Python, or rounded as fp32 rounds them. Does not know models, tensors or batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.engine import GenerationParams
from tests.reference.scores import NextScores
from tests.tiny import Outcome, only_real

# transformers' "never": far below any sum of log-probabilities.
LOWEST = -1.0e9


class Beam(NamedTuple):
    """Tokens (start token first), the sum that beam search ranks by, and what each token added to it.

    `penalties` counts by how many diversity penalties the sum is smaller than the tokens' own scores.
    """

    tokens: tuple[int, ...]
    total: float
    added: tuple[float, ...] = ()
    penalties: int = 0


@dataclass(frozen=True)
class Finished:
    """A place in the pool of results; without a beam it is still free."""

    beam: Beam | None
    score: float


@dataclass(frozen=True)
class Arithmetic:
    """How sums are rounded, and who comes first among equals.

    Attributes:
        rounded: of an exact result; a result of two fp32 numbers, computed in fp64 and rounded, is what fp32 gives.
        place: of a hypothesis, start token first, among those of the very same sum or score, lowest first: their order
            is an accident, but not to a search that is to repeat another's.
    """

    rounded: Callable[[float], float] = float
    place: Callable[[tuple[int, ...]], int] = lambda tokens: 0


EXACT = Arithmetic()


@dataclass(frozen=True)
class Choice:
    """What a group saw in one step, and was left with."""

    ahead: tuple[Beam, ...]  # the best candidates: those of them that end here enter the pool
    live: tuple[Beam, ...]
    pool: tuple[Finished, ...]
    reach: int  # tokens at which the best live beam is compared with the pool's worst
    can_improve: bool


class Group:
    """One beam search among its neighbours; `trace` keeps what each step chose."""

    def __init__(
        self, scores: NextScores, params: GenerationParams, start: int, eos: int, arithmetic: Arithmetic
    ) -> None:
        self.scores, self.params, self.eos = scores, params, eos
        self.rounded, self.place = arithmetic.rounded, arithmetic.place
        self.trace: list[Choice] = []
        self.width = params.num_beams // params.num_beam_groups
        # Only the first beam counts in the first step: all hold the same start token.
        self.live = [Beam((start,), 0.0 if i == 0 else LOWEST) for i in range(self.width)]
        self.pool = [Finished(None, LOWEST)] * self.width
        self.can_improve = True
        self.final = False

    def step(self, taken: Counter[int]) -> None:
        """Choose, finish, keep; `taken` counts the tokens that earlier groups have chosen in this step."""
        length = len(self.live[0].tokens)  # of the hypotheses that end here, start token not counted
        at_limit = length >= self.params.max_new_tokens
        penalty = self.rounded(self.params.diversity_penalty)
        candidates = []
        for beam in self.live:
            for token, added in enumerate(self.scores(beam.tokens)):
                for _ in range(taken[token]):  # one beam that said it after the other
                    added = self.rounded(added - penalty)
                total = self.rounded(beam.total + added)
                said, penalties = (*beam.tokens, token), beam.penalties + taken[token]
                candidates.append(Beam(said, total, (*beam.added, added), penalties))
        candidates = sorted(candidates, key=self._rank)[: 2 * self.width]

        def ends(candidate: Beam) -> bool:
            return at_limit or candidate.tokens[-1] == self.eos

        if self.can_improve and not self._stops_as_full():
            # Only the best candidates may enter the pool; the others are there so that enough can go on.
            entering = [c for c in candidates[: self.width] if ends(c)]
            places = self.pool + [Finished(c, self._score(c, length)) for c in entering]
            self.pool = sorted(places, key=self._rank_finished)[: self.width]

        # Behind those that go on, those that said the end token. At the limit nobody goes on, but what the best would
        # go on with still counts for the groups behind.
        kept = [c._replace(total=self.rounded(c.total + LOWEST)) if c.tokens[-1] == self.eos else c for c in candidates]
        self.live = sorted(kept, key=self._rank)[: self.width]

        look_ahead = self.params.early_stopping == "never" and self.params.length_penalty > 0
        reach = self.params.max_new_tokens if look_ahead else length
        best = self._score(self.live[0], reach)
        worst = min(f.score for f in self.pool)
        self.can_improve &= any(best > (LOWEST if f.beam is None else worst) for f in self.pool)
        self.final = self.final or not self.can_improve or self._stops_as_full() or at_limit
        best_candidates = tuple(candidates[: self.width])
        self.trace.append(Choice(best_candidates, tuple(self.live), tuple(self.pool), reach, self.can_improve))

    def _rank(self, beam: Beam) -> tuple[float, int]:
        return -beam.total, self.place(beam.tokens)

    def _rank_finished(self, finished: Finished) -> tuple[float, int]:
        return -finished.score, self.place(finished.beam.tokens) if finished.beam is not None else 0

    def _score(self, beam: Beam, length: int) -> float:
        return self.rounded(beam.total / self.rounded(length**self.params.length_penalty))

    def _stops_as_full(self) -> bool:
        return self.params.early_stopping is True and all(f.beam is not None for f in self.pool)


def run_groups(
    scores: Sequence[NextScores], params: GenerationParams, start: int, eos: int, arithmetic: Sequence[Arithmetic]
) -> list[Group]:
    """All groups at their end; `scores` and `arithmetic` hold each group's own."""
    groups = [Group(own, params, start, eos, sums) for own, sums in zip(scores, arithmetic, strict=True)]
    while not all(group.final for group in groups):
        taken: Counter[int] = Counter()
        for group in groups:  # one that is final goes on, and counts for those behind it
            group.step(taken)
            taken.update(beam.tokens[-1] for beam in group.live)
    return groups


def best_of(groups: Sequence[Group]) -> Outcome:
    """The best `num_return_sequences` of all groups' hypotheses; at equal scores the earlier group's comes first."""
    params = groups[0].params
    found = sorted((f for group in groups for f in group.pool), key=lambda f: -f.score)
    rows = [(list(f.beam.tokens[1:]), f.score, list(f.beam.added)) for f in found if f.beam is not None]
    return only_real(rows[: params.num_return_sequences], params.length_penalty)


def diverse_beam_search(
    scores: NextScores, params: GenerationParams, start: int, eos: int, arithmetic: Arithmetic = EXACT
) -> Outcome:
    """`best_of` all groups over one model's scores.

    Args:
        scores: processed log-probabilities of the next token.
        params: the options; those of processors are in `scores` already.
        start: the decoder's start token.
        eos: the end token.
        arithmetic: of the sums.
    """
    groups = params.num_beam_groups
    return best_of(run_groups([scores] * groups, params, start, eos, [arithmetic] * groups))
