"""Sampling: seeds that hold in any batch, and frequencies that are those of `generate`'s own processed distribution.

What is expected comes from transformers' processors and warpers, by way of `tests.reference.scores`. Every seed is
fixed: a test here is a computation, not a chance.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from app.engine import Engine, EngineConfig, GenerationParams, Hypothesis, Sequence, kernels
from app.engine.philox import gumbel_noise, philox4x32
from app.engine.sampling import draw_floors, warp
from app.engine.slot_options import ActiveOptions, SlotOptions
from app.engine.top_candidates import BLOCK
from tests.cpu_builds import needs_kernels
from tests.parity import outcome_of
from tests.reference.scores import next_scores
from tests.tiny import EOS, START, TinyShape, generation_config, oracle, random_sources, save, tiny_model

# A flat model: many tokens are likely, so that draws say something.
FLAT = 1.0
SOURCE = tuple(random_sources(1, seed=5, longest=12)[0])
DRAWS = 2400
SAMPLED = GenerationParams(do_sample=True, num_return_sequences=3, max_new_tokens=12, top_k=0, seed=7)
BEAM_SAMPLED = replace(SAMPLED, num_beams=3)
BY = ["torch", pytest.param("kernels", marks=needs_kernels)]


@pytest.fixture(scope="session")
def flat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(seed=3, sharpness=FLAT), tmp_path_factory.mktemp("flat"))


@pytest.fixture
def engine(flat_folder: Path) -> Engine:
    return Engine.from_folder(flat_folder, EngineConfig(max_num_seqs=4))


def run(engine: Engine, *sequences: Sequence) -> list[list[tuple[int, ...]]]:
    for sequence in sequences:
        engine.add(sequence)
    drain(engine)
    return [[h.token_ids for h in hypotheses(sequence)] for sequence in sequences]


def drain(engine: Engine) -> None:
    while engine.scheduler.has_work:
        engine.step()


def hypotheses(sequence: Sequence) -> tuple[Hypothesis, ...]:
    assert sequence.output is not None, sequence.error
    return sequence.output.hypotheses


def options_of(params: list[GenerationParams]) -> tuple[SlotOptions, ActiveOptions]:
    """As an engine has them where each is the first of its kind."""
    options = SlotOptions.empty(len(params), 4, 12, torch.device("cpu"))
    for slot, wanted in enumerate(params):
        options.start([([1], wanted)], slot, EOS)
    return options, ActiveOptions.of(params, [1] * len(params), target=1, source=1, ragged=False)


def draw(folder: Path, params: GenerationParams, count: int = DRAWS) -> list[list[tuple[int, ...]]]:
    """What each of `count` seeds says of the one source."""
    engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=400, max_encode_tokens=8192))
    return run(engine, *(Sequence(SOURCE, replace(params, seed=seed)) for seed in range(count)))


def next_probabilities(params: GenerationParams, before: tuple[int, ...] = ()) -> list[float]:
    """What `generate` draws the next token from."""
    scores = next_scores(tiny_model(seed=3, sharpness=FLAT), SOURCE, params)
    return torch.tensor(scores((START, *before)), dtype=torch.float64).softmax(-1).tolist()


def assert_drawn_from(observed: Counter[Hashable], expected: Mapping[Hashable, float]) -> None:
    """Pearson's chi-square test at 1 in 10,000; what is expected fewer than five times is one cell."""
    count = sum(observed.values())
    assert sum(expected.values()) == pytest.approx(1.0)
    assert set(observed) <= {outcome for outcome, p in expected.items() if p > 0}
    common = [outcome for outcome, p in expected.items() if p * count >= 5]
    cells = [(observed[outcome], expected[outcome] * count) for outcome in common]
    rest = count - sum(e for _, e in cells)
    if rest > 1e-6:
        cells.append((count - sum(o for o, _ in cells), rest))
    assert len(cells) > 1
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    assert statistic < chi2.ppf(1 - 1e-4, len(cells) - 1), cells


@pytest.mark.parametrize("params", [SAMPLED, BEAM_SAMPLED], ids=["sampling", "beam sampling"])
class TestASeed:
    """Holds in any batch."""

    def test_says_the_same_alone_in_company_in_another_slot_and_at_another_step(
        self, params: GenerationParams, engine: Engine, flat_folder: Path
    ) -> None:
        sources = [tuple(ids) for ids in random_sources(6, seed=1)]
        requests = [replace(params, seed=seed) for seed in range(6)]

        def sequences() -> list[Sequence]:
            return [Sequence(ids, p) for ids, p in zip(sources, requests, strict=True)]

        alone = [
            run(Engine.from_folder(flat_folder, EngineConfig(max_num_seqs=1)), sequence)[0] for sequence in sequences()
        ]
        assert len({tuple(said) for said in alone}) == 6
        assert run(engine, *sequences()) == alone
        assert run(engine, *reversed(sequences())) == alone[::-1]
        others = (
            Sequence(sources[0], GenerationParams(num_beams=params.num_beams, max_new_tokens=3)),
            Sequence(sources[1], replace(params, temperature=2.0, top_k=5, max_new_tokens=2, seed=99)),
        )
        assert run(engine, *others, *sequences())[2:] == alone
        late = sequences()
        for sequence in late:
            engine.add(sequence)
            engine.step()
        drain(engine)
        assert [[h.token_ids for h in hypotheses(sequence)] for sequence in late] == alone

    def test_other_than_another_says_other_things(self, params: GenerationParams, engine: Engine) -> None:
        # Seeds that differ in their high 32 bits only are other seeds too.
        seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
        said = run(engine, *(Sequence(SOURCE, replace(params, seed=seed)) for seed in seeds))
        assert len({tuple(s) for s in said}) == len(seeds)

    def test_that_is_left_out_is_a_new_one(self, params: GenerationParams, engine: Engine) -> None:
        said = run(engine, *(Sequence(SOURCE, replace(params, seed=None)) for _ in range(4)))
        assert len({tuple(s) for s in said}) == 4

    def test_draws_other_samples_for_one_text(self, params: GenerationParams, engine: Engine) -> None:
        said = run(engine, *(Sequence(SOURCE, replace(params, seed=seed)) for seed in range(4)))
        assert all(len(set(samples)) == 3 for samples in said)


PROCESSED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_p": 0.6},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.8},
    {"top_p": 0.9, "repetition_penalty": 1.5, "suppress_tokens": (3, 9, 27), "min_new_tokens": 1},
]


@pytest.mark.parametrize("options", PROCESSED, ids=str)
def test_first_tokens_are_drawn_from_the_distribution_that_generate_processes(
    options: dict[str, Any], flat_folder: Path
) -> None:
    params = replace(SAMPLED, num_return_sequences=1, max_new_tokens=1, **options)
    expected = next_probabilities(params)
    # The reference's distribution is generate's: its own scores, as it returns them.
    model, ids = tiny_model(seed=3, sharpness=FLAT), torch.tensor([SOURCE])
    config = generation_config(model, params)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert out.scores[0][0].softmax(-1).tolist() == pytest.approx(expected, abs=1e-5)
    observed: Counter[Hashable] = Counter(said[0][0] for said in draw(flat_folder, params))
    assert_drawn_from(observed, dict(enumerate(expected)))


def test_the_draws_of_two_steps_are_independent(flat_folder: Path) -> None:
    params = replace(SAMPLED, num_return_sequences=1, max_new_tokens=2, min_new_tokens=2, top_k=4)
    expected: dict[Hashable, float] = {
        (first, second): p * q
        for first, p in enumerate(next_probabilities(params))
        if p > 0
        for second, q in enumerate(next_probabilities(params, (first,)))
    }
    assert_drawn_from(Counter(said[0] for said in draw(flat_folder, params)), expected)


def test_the_draws_of_two_samples_of_one_text_are_independent(flat_folder: Path) -> None:
    params = replace(SAMPLED, num_return_sequences=2, max_new_tokens=1, top_k=5, temperature=1.5)
    p = next_probabilities(params)
    expected: dict[Hashable, float] = {(i, j): p[i] * p[j] for i in range(len(p)) for j in range(len(p))}
    # Samples may be returned in any order: a pair is what is drawn.
    observed: Counter[Hashable] = Counter()
    for first, second in draw(flat_folder, params):
        observed[tuple(sorted((first[0], second[0])))] += 1
    pairs: dict[Hashable, float] = {
        (i, j): expected[i, j] * (1 if i == j else 2) for i in range(len(p)) for j in range(i, len(p))
    }
    assert_drawn_from(observed, pairs)


@pytest.mark.parametrize("options", [{"temperature": 0.25}, {"top_k": 6}, {"top_p": 0.8, "temperature": 0.3}], ids=str)
def test_beam_sampling_draws_candidates_without_replacement(options: dict[str, Any], flat_folder: Path) -> None:
    # With one token to say and two beams, the two that may finish are the first two candidates drawn.
    params = replace(BEAM_SAMPLED, num_beams=2, num_return_sequences=2, max_new_tokens=1)
    params = replace(params, **options)
    p = next_probabilities(params)
    pairs: dict[Hashable, float] = {
        (i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in itertools.combinations(range(len(p)), 2)
    }
    said = draw(flat_folder, params)
    assert_drawn_from(Counter(tuple(sorted((a[0], b[0]))) for a, b in said), pairs)
    # They are returned best first, whichever was drawn first.
    assert all(p[best[0]] >= p[other[0]] * (1 - 1e-6) for best, other in said)


def test_beam_sampling_draws_from_the_scores_that_the_beams_have_gathered(flat_folder: Path) -> None:
    # The second step of two beams, three likely tokens each: the likelier beam has the likelier candidates.
    params = replace(
        BEAM_SAMPLED, num_beams=2, num_return_sequences=1, max_new_tokens=2, min_new_tokens=2, top_k=3, temperature=0.7
    )
    scores = next_scores(tiny_model(seed=3, sharpness=FLAT), SOURCE, params)

    def options(totals: dict[tuple[int, ...], float]) -> list[tuple[tuple[int, ...], float, float]]:
        """(tokens, total, probability) of each continuation of the live beams."""
        found = [
            ((*said, token), total + score)
            for said, total in totals.items()
            for token, score in enumerate(scores((START, *said)))
            if score > -math.inf
        ]
        best = max(total for _, total in found)
        mass = sum(math.exp(total - best) for _, total in found)
        return [(said, total, math.exp(total - best) / mass) for said, total in found]

    def ordered_draws(
        found: list[tuple[tuple[int, ...], float, float]], count: int
    ) -> list[tuple[list[tuple[tuple[int, ...], float]], float]]:
        """Every sequence of `count` draws without replacement, and its probability."""
        draws = []
        for chosen in itertools.permutations(found, count):
            left, chance = 1.0, 1.0
            for _, _, p in chosen:
                chance *= p / left
                left -= p
            draws.append(([(said, total) for said, total, _ in chosen], chance))
        return draws

    expected: defaultdict[Hashable, float] = defaultdict(float)
    # Three candidates exist in the first step, four are drawn: the three, and one that cannot be; the best two go on.
    first = sorted(options({(): 0.0}), key=lambda o: -o[1])[:2]
    for drawn, chance in ordered_draws(options({said: total for said, total, _ in first}), 2):
        expected[max(drawn, key=lambda d: d[1])[0]] += chance
    observed: Counter[Hashable] = Counter(said[0] for said in draw(flat_folder, params))
    assert_drawn_from(observed, expected)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.4}, {"top_k": 9, "top_p": 0.5}, {"top_k": 1}], ids=str)
def test_every_token_lies_where_top_k_and_top_p_allow(options: dict[str, Any], num_beams: int, engine: Engine) -> None:
    params = replace(BEAM_SAMPLED, num_beams=num_beams, num_return_sequences=min(3, num_beams), temperature=3.0)
    params = replace(params, **options)
    sources = [tuple(ids) for ids in random_sources(6, seed=8)]
    sequences = [Sequence(ids, replace(params, seed=seed)) for seed, ids in enumerate(sources)]
    run(engine, *sequences)
    model = tiny_model(seed=3, sharpness=FLAT)
    for sequence in sequences:
        scores = next_scores(model, sequence.source_ids, params)
        said = outcome_of(sequence).tokens
        assert said
        for tokens in said:
            for at, token in enumerate(tokens):
                assert scores((START, *tokens[:at]))[token] > -math.inf


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_temperature_near_zero_says_what_is_said_without_sampling(num_beams: int, engine: Engine) -> None:
    params = GenerationParams(num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=12)
    model = tiny_model(seed=3, sharpness=FLAT)
    cold = replace(params, do_sample=True, temperature=1e-4, top_k=0, seed=3)
    sources = [tuple(ids) for ids in random_sources(6, seed=9)]
    said = run(engine, *(Sequence(ids, cold) for ids in sources))
    assert [[list(tokens) for tokens in s] for s in said] == [oracle(model, ids, params).tokens for ids in sources]


def test_top_k_of_one_says_what_greedy_says(engine: Engine) -> None:
    sources = [tuple(ids) for ids in random_sources(6, seed=9)]
    greedy = run(engine, *(Sequence(ids, GenerationParams(max_new_tokens=12)) for ids in sources))
    only = GenerationParams(max_new_tokens=12, do_sample=True, top_k=1, temperature=5.0, seed=1)
    assert run(engine, *(Sequence(ids, only) for ids in sources)) == greedy


def test_log_probabilities_are_those_of_the_processed_distribution(engine: Engine) -> None:
    params = replace(SAMPLED, temperature=1.7, top_k=12, top_p=0.9)
    sequence = Sequence(SOURCE, params)
    run(engine, sequence)
    for hypothesis in hypotheses(sequence):
        expected = [
            math.log(next_probabilities(params, hypothesis.token_ids[:at])[token])
            for at, token in enumerate(hypothesis.token_ids)
        ]
        assert hypothesis.token_logprobs == pytest.approx(expected, abs=1e-4)
        assert hypothesis.score == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert hypothesis.finish_reason == ("eos" if hypothesis.token_ids[-1] == EOS else "length")


@needs_kernels
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("options", PROCESSED, ids=str)
def test_kernels_draw_what_torch_draws(
    options: dict[str, Any], num_beams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_model(seed=3, sharpness=FLAT, shape=TinyShape(vocab=256)), tmp_path)
    params = [replace(SAMPLED, num_beams=num_beams, seed=seed, **options) for seed in range(6)]

    def said() -> list[list[tuple[int, ...]]]:
        engine = Engine.from_folder(folder, EngineConfig(max_num_seqs=4))
        return run(engine, *(Sequence(SOURCE, own) for own in params))

    ours = said()
    assert kernels.cpu_kernels() is not None
    monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    assert said() == ours


# Random123's kat_vectors for philox4x32 with ten rounds.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_numbers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == expected


def test_philox_of_many_counters_is_that_of_each() -> None:
    counters, keys = torch.tensor([c for c, _, _ in KNOWN]), torch.tensor([k for _, k, _ in KNOWN])
    assert philox4x32(counters, keys).tolist() == [expected for _, _, expected in KNOWN]


def test_noise_does_not_depend_on_how_many_slots_it_is_made_for_at_once() -> None:
    seeds, steps = torch.randint(2**32, (5, 2)), torch.tensor([1, 9, 3, 128, 1])
    alone = gumbel_noise(seeds, steps, 3, 128, together=1)
    assert torch.equal(gumbel_noise(seeds, steps, 3, 128, together=2), alone)
    assert torch.equal(gumbel_noise(seeds, steps, 3, 128, together=16), alone)
    assert torch.equal(gumbel_noise(seeds[3:4], steps[3:4], 2, 64)[0], alone[3, :2, :64])


@pytest.mark.parametrize("by", BY)
@settings(deadline=None)
@given(data=st.data())
def test_filters_equal_transformers(by: str, data: st.DataObject) -> None:
    count, keep = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.randn(count, 2, 7, generator=generator)
    params = [
        GenerationParams(
            do_sample=True,
            temperature=data.draw(st.sampled_from([1.0, 0.5, 2.0])),
            top_k=data.draw(st.sampled_from([0, 1, 3, 50])),
            top_p=data.draw(st.sampled_from([1.0, 0.9, 0.4])),
        )
        for _ in range(count)
    ]
    options, active = options_of(params)
    padded = torch.nn.functional.pad(scores, (0, BLOCK - 7), value=-torch.inf)
    if by == "torch":
        ours = warp(padded, options, active, min_tokens_to_keep=keep)
    else:
        floors = draw_floors(padded, options, active, keep, draw_kernels(by))
        ours = padded / options.temperature[:, None, None]
        ours = ours.masked_fill(ours < floors[..., None], -torch.inf)
    for row, wanted in enumerate(params):
        chosen = LogitsProcessorList([TemperatureLogitsWarper(wanted.temperature)])
        if wanted.top_k:
            chosen.append(TopKLogitsWarper(wanted.top_k, min_tokens_to_keep=keep))
        if wanted.top_p < 1.0:
            chosen.append(TopPLogitsWarper(wanted.top_p, min_tokens_to_keep=keep))
        expected = chosen(None, scores[row].clone())
        torch.testing.assert_close(ours[row, :, :7], expected)


def draw_kernels(name: str) -> ModuleType | None:
    """Who finds floors."""
    found = kernels.cpu_kernels() if name == "kernels" else None
    assert (found is None) == (name == "torch")
    return found


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("columns", [192, 50_304])
@pytest.mark.parametrize("keep", [1, 2])
def test_floors_do_not_depend_on_the_company(by: str, columns: int, keep: int) -> None:
    """Whoever looks at how many of the best tokens. Of one row with 32,768 columns torch's sums are others."""
    filters = [(0, 0.05), (0, 0.5), (0, 0.99), (0, 1.0), (3, 0.5), (40, 1.0), (100, 0.9), (0, 0.7)] * 4
    params = [
        GenerationParams(do_sample=True, temperature=0.7 + row % 3, top_k=top_k, top_p=top_p)
        for row, (top_k, top_p) in enumerate(filters)
    ]
    scores = torch.randn(len(params), 1, columns, generator=torch.Generator().manual_seed(3)) * 0.7
    scores[..., -6:] = -torch.inf
    together = draw_floors(scores, *options_of(params), keep, draw_kernels(by))
    alone = [
        draw_floors(scores[row : row + 1], *options_of([one]), keep, draw_kernels(by))[0]
        for row, one in enumerate(params)
    ]
    assert torch.equal(torch.stack(alone), together)
    unfiltered = torch.tensor([one.top_k == 0 and one.top_p == 1 for one in params])
    assert torch.equal((together == -torch.inf)[:, 0], unfiltered)
