"""Is the engine's outcome its oracle's, and if not, is it a float tie? One judgement for the test and the benchmark.

The oracle is `generate`, and `tests.reference` for groups of beams. Knows of the engine's inside only the logits that
tests/recorder.py kept of its run.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import EncoderDecoderModel

from app.engine import GenerationParams
from app.engine import Sequence as EngineSequence
from app.engine.kernels import step_kernels_for
from app.engine.top_candidates import BLOCK
from tests.reference.diverse_beam_search import (
    EXACT,
    Arithmetic,
    Beam,
    Choice,
    best_of,
    diverse_beam_search,
    run_groups,
)
from tests.reference.monte_carlo_arithmetic import rounded_at_random
from tests.reference.scores import NextScores, next_scores, processed
from tests.tiny import EOS, NOT_REAL, START, KeptScores, Outcome, TinyShape, only_real, oracle, tiny_model

# fp32 against fp32, by other kernels: scores are sums, log-probabilities differences of logits of any size.
REL, ABS = 1e-4, 1e-4
# The same fp32 sums, perhaps by other instructions: a few units in the last place.
REPLAY_REL, REPLAY_ABS = 2e-6, 2e-6
# How much further from fp64 than others' fp32 scores the engine's may be. All are draws of the same kind: those of
# transformers, and, where one draw is too few to tell, those of so many runs that round at random.
NOISE_RATIO = 2.0
RANDOM_RUNS = 8

Prefix = tuple[int, ...]
# What a run of the engine kept of one sequence, for each group of beams: see `Recorder.logits`.
EngineLogits = Sequence[Mapping[Prefix, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """A tiny model that can be made again in another precision."""

    seed: int
    sharpness: float
    shape: TinyShape

    def model(self, dtype: torch.dtype = torch.float32) -> EncoderDecoderModel:
        """The same weights each time, rounded to `dtype`."""
        return tiny_model(self.seed, self.sharpness, dtype, self.shape)


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one case.

    Attributes:
        kind: "equal"; "fp64" and "noise" are proven float ties (see `classify`); "mismatch" is anything else.
        margin: where the search over the engine's logits and that over transformers' part: what fp64 says lies between
            a candidate that only the one chose and a candidate that only the other chose. For equal tokens, by how much
            scores differ beyond the tolerance.
        difference: the greatest |fp32 - fp64| of what those two candidates are ranked by, on either side.
        noise: the greatest |fp32 - fp64| of a token's score: of the engine's own logits, for every prefix that the
            search over them visits; infinite if there is one that the engine did not decode.
        others_noise: the same of transformers' fp32 logits, for these and for what the oracle visits. Where it alone is
            what speaks against a tie: the greatest of it and of runs that round at random, for what ours visits.
    """

    kind: str
    margin: float = 0.0
    difference: float = 0.0
    noise: float = 0.0
    others_noise: float = 0.0

    @property
    def accepted(self) -> bool:
        """Whether nothing is left to explain."""
        return self.kind != "mismatch"

    @property
    def measured(self) -> tuple[float, float, float, float]:
        """All but the kind."""
        return self.margin, self.difference, self.noise, self.others_noise


def kind_of(params: GenerationParams) -> str:
    """The search that a request asks for."""
    if params.num_beam_groups > 1:
        return "diverse"
    return "beam" if params.num_beams > 1 else "greedy"


def outcome_of(sequence: EngineSequence) -> Outcome:
    """The hypotheses of a finished sequence, each of them real; one that failed has none."""
    params = sequence.params
    hypotheses = sequence.output.hypotheses if sequence.output is not None else ()
    rows = [(list(h.token_ids), h.score, list(h.token_logprobs)) for h in hypotheses]
    outcome = only_real(rows, params.length_penalty if params.num_beams > 1 else 0.0)
    assert len(outcome.tokens) == len(rows), f"a hypothesis that is none: {rows}"
    return outcome


def expected_outcome(model: EncoderDecoderModel, source: tuple[int, ...], params: GenerationParams) -> Outcome:
    """What the oracle says; sums are in fp32 with both."""
    if params.num_beam_groups > 1:
        return diverse_beam_search(next_scores(model, source, params), params, START, EOS, Arithmetic(fp32))
    return oracle(model, source, params)


@dataclass(frozen=True)
class Search:
    """A search's outcome, and what each of its groups of beams chose, step by step."""

    outcome: Outcome
    traces: list[list[Choice]]

    def ranking(self, params: GenerationParams) -> list[tuple[int, Ranked]]:
        """Everything that was finished, best first, and which group finished it."""
        pools = [(group, finished) for group, trace in enumerate(self.traces) for finished in trace[-1].pool]
        pools.sort(key=lambda pair: -pair[1].score)  # among equals the earlier group's come first
        return [(group, _scored(finished.beam, params)) for group, finished in pools if finished.beam is not None]


def search(scores: Sequence[NextScores], params: GenerationParams, arithmetic: Sequence[Arithmetic] = ()) -> Search:
    """Any search whose result does not depend on chance, in Python, over any scores: those of each group of beams.

    `arithmetic`: of each group; sums are exact if it is left out.
    """
    arithmetic = arithmetic or [EXACT] * len(scores)
    if params.num_beams > 1:
        groups = run_groups(scores, params, START, EOS, arithmetic)
        return Search(best_of(groups), [group.trace for group in groups])
    rounded, place = arithmetic[0].rounded, arithmetic[0].place
    said = Beam((START,), 0.0)
    trace: list[Choice] = []
    while len(said.added) < params.max_new_tokens and EOS not in said.tokens[1:][-1:]:
        row = scores[0](said.tokens)
        best = [token for token, score in enumerate(row) if score == max(row)] or [0]  # none is: not numbers
        token = min(best, key=lambda token: place((*said.tokens, token)))
        logsumexp = rounded(float(torch.tensor(row, dtype=torch.float64).logsumexp(-1)))
        added = rounded(row[token] - logsumexp)
        said = Beam((*said.tokens, token), rounded(said.total + added), (*said.added, added))
        trace.append(Choice((said,), (said,), (), len(said.added), True))
    score = rounded(said.total / len(said.added))
    return Search(only_real([(list(said.tokens[1:]), score, list(said.added))], 0.0), [trace])


def classify(
    recipe: Recipe,
    source: tuple[int, ...],
    params: GenerationParams,
    ours: Outcome,
    theirs: Outcome,
    engine_logits: EngineLogits,
) -> Verdict:
    """Compare two outcomes; other tokens, or scores beyond the tolerance, are a float tie only if that is proven.

    "fp64": the search over an fp64 copy of the model, with fp64 sums, gives our tokens, and our scores within the
    tolerance.

    "noise": the engine's search is right given its logits, and its logits are right but for noise:

    - The search in tests/reference, over transformers' own processors and the very logits that the engine had, by its
      own log-softmax, with fp32 sums, gives our tokens and our scores. It may visit no prefix that the engine did not
      decode.
    - On every prefix that this search visits, the engine's scores are no further from the fp64 model's than
      `NOISE_RATIO` times the greatest distance that transformers' own fp32 scores have from them there, or on what the
      oracle visited, with its cache or without; or than that of runs of the fp64 model that round to fp32 at random.
    - The same search over what `generate` had (for groups, over transformers' scores) gives what the oracle says, and
      where the two searches part, fp64 sees no more between the candidates than twice the measured difference of one.
      Searches that choose the same part in the order of the result. (With equal tokens they may never part.)
    """
    same_tokens = ours.tokens == theirs.tokens
    excess = worst_difference(ours, theirs) if same_tokens else math.inf
    if excess <= 0:
        return Verdict("equal")
    model, exact_model = recipe.model(), recipe.model(torch.float64)
    plain, exact = next_scores(model, source, params), next_scores(exact_model, source, params)
    kept, groups = KeptScores(), params.num_beam_groups
    if groups == 1:
        oracle(model, source, params, kept)
    said = _Visited(lambda tokens: kept.rows[tokens] if tokens in kept.rows else plain(tokens))
    other = search([said] * groups, params, [Arithmetic(fp32, chosen(kept.rows, theirs))] * groups)
    replayed, noise, margin, difference = None, math.inf, excess, 0.0
    own = [_Visited(processed(rows.__getitem__, model, source, params, as_the_engine)) for rows in engine_logits]
    decoded = [Arithmetic(fp32, chosen(rows, ours)) for rows in engine_logits]
    with suppress(KeyError):  # a prefix that the engine did not decode
        replayed = search(own, params, decoded)
        noise = max(_distance(scores, exact, list(scores.prefixes)) for scores in own)
        margin, difference = _parting(params, exact, (replayed, own), (other, [said] * groups))
    visited = {tokens for scores in own for tokens in scores.prefixes}
    others_noise = max(_distance(plain, exact, visited), _distance(said, exact, list(said.prefixes)))
    never_parted = same_tokens and margin == math.inf
    margin = excess if never_parted else margin
    verdict = partial(Verdict, margin=margin, difference=difference, noise=noise)
    settled = search([exact] * groups, params).outcome
    if settled.tokens == ours.tokens and worst_difference(ours, settled) <= 0:
        return verdict("fp64", others_noise=others_noise)
    explained = (
        replayed is not None
        and replayed.outcome.tokens == ours.tokens
        and worst_difference(ours, replayed.outcome, REPLAY_REL, REPLAY_ABS) <= 0
        and other.outcome.tokens == theirs.tokens
        and (never_parted or margin <= 2 * difference)
    )
    for run in range(RANDOM_RUNS if explained else 0):
        if noise <= NOISE_RATIO * others_noise:
            break
        drawn = rounded_at_random(exact_model, source, params, seed=run)
        others_noise = max(others_noise, _distance(drawn, exact, visited))
    is_noise = explained and noise <= NOISE_RATIO * others_noise < math.inf
    kind = "noise" if is_noise else "mismatch"
    return verdict(kind, others_noise=others_noise)


def as_the_engine(row: Tensor) -> Tensor:
    """The log-softmax of [1, V'] of an engine on this CPU, to the last bit: torch's, or that of a kernel."""
    kernels = step_kernels_for(torch.device("cpu"), torch.float32)
    if kernels is None or row.dtype is not torch.float32 or row.shape[-1] % BLOCK:
        return row.log_softmax(-1)
    scores: Tensor = kernels.log_softmax(row[None].clone())[0]
    return scores


def worst_difference(ours: Outcome, theirs: Outcome, rel: float = REL, abs_: float = ABS) -> float:
    """By how much scores of the same tokens differ beyond what fp32 explains; not above 0 if they do not."""
    pairs = list(zip(ours.scores, theirs.scores, strict=True))
    for mine, other in zip(ours.token_logprobs, theirs.token_logprobs, strict=True):
        if len(mine) != len(other):
            return math.inf
        pairs += zip(mine, other, strict=True)
    return max((abs(a - b) - max(abs_, rel * abs(b)) for a, b in pairs), default=0.0)


class _Visited:
    """Scores, and every prefix for which they were asked."""

    def __init__(self, scores: NextScores) -> None:
        self.scores = scores
        self.prefixes: dict[Prefix, None] = {}

    def __call__(self, tokens: Prefix) -> list[float]:
        self.prefixes[tokens] = None
        return self.scores(tokens)


def chosen(went_on: Container[Prefix], outcome: Outcome) -> Callable[[Prefix], int]:
    """How a side ordered hypotheses of the very same score, as far as that is known: see `Arithmetic.place`.

    First what is in its outcome, in that order; then what it went on with (the prefixes that were decoded).
    """
    places = {(START, *tokens): place for place, tokens in enumerate(outcome.tokens)}
    return lambda tokens: places.get(tokens, len(places) + (tokens not in went_on))


def fp32(value: float) -> float:
    """Rounded to the nearest fp32 number."""
    return ctypes.c_float(value).value


def _distance(scores: NextScores, exact: NextScores, prefixes: Iterable[Prefix]) -> float:
    """The greatest |difference| of a token's score; infinite if only one side rules a token out."""
    worst = 0.0
    for tokens in prefixes:
        one, other = (torch.tensor(side(tokens), dtype=torch.float64) for side in (scores, exact))
        apart = torch.where(one == other, 0.0, (one - other).abs())
        worst = max(worst, float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return worst


# A hypothesis, and by what its sum is divided when it is ranked.
Ranked = tuple[Beam, float]


def _parting(
    params: GenerationParams,
    exact: NextScores,
    ours: tuple[Search, Sequence[NextScores]],
    theirs: tuple[Search, Sequence[NextScores]],
) -> tuple[float, float]:
    """Where two searches part first: (what fp64 sees between two candidates, the greatest |fp32 - fp64| of either).

    Of the pairs of which one side chose the one and the other side the other, the closest. Where both choose the same
    throughout, of the pairs that stand in one place of the two results, the one that is least of a tie; (infinity, 0)
    if there is none. Raises KeyError if the engine did not decode what it would have to have ranked.
    """
    scores = ours[1], theirs[1]

    def gap(one: tuple[int, Ranked], two: tuple[int, Ranked]) -> tuple[float, float]:
        """Of two hypotheses, each with its group."""
        true = [_rank(exact, ranked, params, float) for _, ranked in (one, two)]
        rounded = [[_rank(side[group], ranked, params, fp32) for group, ranked in (one, two)] for side in scores]
        apart = max(abs(seen - one) for side in rounded for seen, one in zip(side, true, strict=True))
        return abs(true[0] - true[1]), apart

    for step in zip(*(list(zip(*found.traces, strict=True)) for found, _ in (ours, theirs)), strict=False):
        for group, (mine, other) in enumerate(zip(*step, strict=True)):
            if pairs := _apart(mine, other, params):
                return min(gap((group, one), (group, two)) for one, two in pairs)
    placed = zip(ours[0].ranking(params), theirs[0].ranking(params), strict=False)
    gaps = [gap(one, two) for one, two in placed if one[1][0].tokens != two[1][0].tokens]
    return max(gaps, key=lambda found: found[0] - 2 * found[1], default=(math.inf, 0.0))


def _apart(mine: Choice, other: Choice, params: GenerationParams) -> list[tuple[Ranked, Ranked]]:
    """Pairs of which one side chose the first and the other the second, for the first thing that they chose apart."""

    def only(some: Iterable[Beam], others: Iterable[Beam]) -> list[Beam]:
        known = {beam.tokens for beam in others}
        return [beam for beam in some if beam.tokens not in known and beam.total > NOT_REAL]

    def ended(choice: Choice) -> list[Beam]:
        return [finished.beam for finished in choice.pool if finished.beam is not None]

    for one, two in ((mine.ahead, other.ahead), (mine.live, other.live)):
        if pairs := [((a, 1.0), (b, 1.0)) for a in only(one, two) for b in only(two, one)]:
            return pairs
    if pairs := [
        (_scored(a, params), _scored(b, params))
        for a in only(ended(mine), ended(other))
        for b in only(ended(other), ended(mine))
    ]:
        return pairs
    if mine.can_improve != other.can_improve:
        worst = [ended(choice)[-1] for choice in (mine, other)]
        return [((c.live[0], c.reach**params.length_penalty), _scored(b, params)) for c in (mine, other) for b in worst]
    return []


def _scored(beam: Beam, params: GenerationParams) -> Ranked:
    return beam, len(beam.added) ** params.length_penalty


def _rank(scores: NextScores, ranked: Ranked, params: GenerationParams, rounded: Callable[[float], float]) -> float:
    beam, divisor = ranked
    total = 0.0
    for at, token in enumerate(beam.tokens[1:], 1):
        total = rounded(total + scores(beam.tokens[:at])[token])
    return rounded(rounded(total - beam.penalties * params.diversity_penalty) / divisor)
