"""The engine against its oracle: `generate`, fp32, one text at a time, over random tiny models, inputs and options.

Sequences of one case run in one engine with mixed options, few slots and small encode budgets, so that what is compared
is in-flight batching, not a loop over single texts. Groups of beams, which `generate` has not, are compared with the
reference in `tests/reference`, and that with `generate` where both can.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine import Engine, EngineConfig, GenerationParams, Sequence, kernels
from app.engine.checkpoint import load_checkpoint
from app.engine.linear import PanelLinear
from app.engine.models.bert_decoder import BertDecoder
from app.engine.models.bert_encoder import BertEncoder
from app.engine.models.gpt2_decoder import Gpt2Decoder
from app.engine.models.layers import LayerNorm
from tests import parity
from tests.cpu_builds import HERE
from tests.parity import (
    Recipe,
    Verdict,
    as_the_engine,
    chosen,
    classify,
    expected_outcome,
    fp32,
    outcome_of,
    search,
    worst_difference,
)
from tests.recorder import Recorder
from tests.reference.diverse_beam_search import Arithmetic
from tests.reference.scores import NextLogits, NextScores, next_logits, next_scores, processed
from tests.tiny import (
    EOS,
    START,
    VOCAB,
    Outcome,
    TinyShape,
    oracle,
    random_diverse_params,
    random_params,
    random_sources,
    save,
    tiny_model,
    without_padding,
)

MODELS, CASES_PER_MODEL, DIVERSE_PER_MODEL, SAMPLED_PER_MODEL = 25, 20, 3, 2


def recipe_for(seed: int, rng: random.Random) -> Recipe:
    # Every second model projects its encoder's output; the others' heads are whole vectors, of either length.
    shape = (
        TinyShape(hidden=32, encoder_hidden=32)
        if seed % 2
        else TinyShape(encoder_hidden=24, layers=rng.choice([1, 3]), activation="gelu_new")
    )
    return Recipe(seed, rng.choice([1.0, 3.0, 6.0, 12.0]), replace(shape, float16_weights=seed % 4 < 2))


def run(engine: Engine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.has_work:
        engine.step()


def assert_equals_generate(recipe: Recipe, rng: random.Random, folder: Path, cases: int, diverse: int) -> None:
    """Random options over random sources, in flight together, and each against its oracle."""
    model = recipe.model()
    config = EngineConfig(max_num_seqs=rng.choice([1, 3, 16]), max_encode_tokens=rng.choice([1, 64, 4096]))
    vocab, seed = recipe.shape.vocab, recipe.seed
    params = [
        *(random_params(rng, vocab) for _ in range(cases)),
        *(random_diverse_params(rng, vocab) for _ in range(diverse)),
        # Company only: what they say is chance, and must change nothing for the others.
        *(
            GenerationParams(do_sample=True, num_beams=1 + 2 * i, max_new_tokens=30, seed=i)
            for i in range(SAMPLED_PER_MODEL)
        ),
    ]
    if recipe.shape.decoder == "roberta":
        params = [without_padding(p) for p in params]
    sources = random_sources(len(params), seed, vocab=vocab)
    sequences = [Sequence(tuple(ids), p) for ids, p in zip(sources, params, strict=True)]
    rng.shuffle(sequences)
    with Recorder() as recorder:
        run(Engine.from_folder(save(model, folder), config), sequences)
    for sequence in sequences:
        if sequence.params.do_sample:
            continue
        ours = outcome_of(sequence)
        expected = expected_outcome(model, sequence.source_ids, sequence.params)
        logits = recorder.logits(sequence)
        verdict = classify(recipe, sequence.source_ids, sequence.params, ours, expected, logits)
        assert verdict.accepted, (verdict, sequence.error, sequence.params, ours, expected)
        for hypothesis in sequence.output.hypotheses if sequence.output else ():
            assert hypothesis.finish_reason == ("eos" if hypothesis.token_ids[-1] == EOS else "length")
            assert len(hypothesis.token_ids) <= sequence.params.max_new_tokens


@pytest.mark.parametrize("seed", range(MODELS))
def test_tokens_and_scores_equal_generate(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take_for: Callable[[str], None]
) -> None:
    """By kernels for processors of each kind, as far as this one can run them; and as where was no C compiler."""
    if HERE:
        take_for(HERE[seed // 2 % len(HERE)])
    if seed % 5 == 0:
        monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    rng = random.Random(seed)
    assert_equals_generate(recipe_for(seed, rng), rng, tmp_path, CASES_PER_MODEL, DIVERSE_PER_MODEL)


# Decoder and encoder: every kind that the engine has a network for.
FAMILIES = [
    ("roberta", "roberta"),
    ("electra", "electra"),
    ("gpt2", "bert"),
    ("gpt2", "roberta"),
    ("bert", "distilbert"),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("decoder", "encoder"), FAMILIES)
def test_other_families_equal_generate(decoder: str, encoder: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{decoder} {encoder} {seed}")
    activation = rng.choice(["gelu", "gelu_new", "relu"])
    layers, width = rng.choice([1, 2, 3]), rng.choice([16, 24])
    shape = TinyShape(decoder=decoder, encoder=encoder, layers=layers, encoder_hidden=width, activation=activation)
    recipe = Recipe(seed, rng.choice([3.0, 6.0, 12.0]), replace(shape, float16_weights=seed == 1))
    assert_equals_generate(recipe, rng, tmp_path, cases=16, diverse=2)


@pytest.mark.skipif(kernels.cpu_kernels() is None, reason="kernels do not work: test_cpu_kernels.py")
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize(("decoder", "encoder"), [("bert", "bert"), *FAMILIES])
def test_every_product_of_a_model_saved_in_fp16_keeps_its_weights_so(
    decoder: str, encoder: str, rounded: bool, tmp_path: Path
) -> None:
    shape = TinyShape(decoder=decoder, encoder=encoder, encoder_hidden=24, float16_weights=rounded)
    model = load_checkpoint(save(tiny_model(3, shape=shape), tmp_path), "cpu", "float32").model
    assert isinstance(model.encoder, BertEncoder)
    assert isinstance(model.decoder, (BertDecoder, Gpt2Decoder))
    head = model.decoder.scores if isinstance(model.decoder, Gpt2Decoder) else model.decoder.lm_head.decoder
    layers = (*model.encoder.layers, *model.decoder.layers)
    made = [x for layer in layers for x in vars(layer).values() if not isinstance(x, LayerNorm)]
    assert len(made) == 2 * 4 + 2 * 7
    for product in (*made, head, model.projection):
        assert isinstance(product, PanelLinear)
        assert product.panels.dtype is (torch.float16 if rounded else torch.float32)


# Options drawn at random often bind nothing. Here each is made from what is said without it, so that it must.
Said = list[int]
BINDING: dict[str, Any] = {
    "no_repeat_ngram_size": lambda said: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda said: {"encoder_no_repeat_ngram_size": 1},
    "repetition_penalty": lambda said: {"repetition_penalty": 5.0},
    "a bad word of one token": lambda said: {"bad_words_ids": ((said[3],),)},
    "a bad word of three tokens": lambda said: {"bad_words_ids": (tuple(said[3:6]),)},
    "a bad word that begins with the start token": lambda said: {"bad_words_ids": ((START, *said[:2]),)},
    "bad words of many lengths": lambda said: {"bad_words_ids": tuple(tuple(said[: n + 1]) for n in range(6))},
    "suppress_tokens": lambda said: {"suppress_tokens": tuple(said[1:4])},
    "begin_suppress_tokens": lambda said: {"begin_suppress_tokens": (said[0],)},
    "forced_bos_token_id": lambda said: {"forced_bos_token_id": (said[0] + 1) % VOCAB},
    "begin_suppress_tokens behind a forced first token": lambda said: {
        "forced_bos_token_id": said[0],
        "begin_suppress_tokens": (said[1],),
    },
    "forced_eos_token_id": lambda said: {"forced_eos_token_id": EOS},
    "forced_eos_token_id of another token": lambda said: {"forced_eos_token_id": (said[-1] + 1) % VOCAB},
}


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("option", BINDING)
def test_an_option_that_changes_what_is_said_changes_it_as_in_generate(
    option: str, num_beams: int, tiny_folder: Path
) -> None:
    model = tiny_model(seed=3)
    plain = GenerationParams(num_beams=num_beams, max_new_tokens=12, min_new_tokens=12)
    for source in random_sources(20, seed=11):
        said = oracle(model, source, plain).tokens[0]
        params = replace(plain, **BINDING[option](said))
        expected = oracle(model, source, params)
        if expected.tokens[0] != said:
            break
    else:
        pytest.fail("the option binds nowhere")
    sequence = Sequence(tuple(source), params)
    run(Engine.from_folder(tiny_folder, EngineConfig()), [sequence])
    ours = outcome_of(sequence)
    assert ours.tokens == expected.tokens
    assert worst_difference(ours, expected) <= 0


@pytest.mark.parametrize("num_beams", [1, 3])
def test_options_that_leave_nothing_to_say_leave_no_hypothesis_as_in_generate(
    num_beams: int, tiny_folder: Path
) -> None:
    params = GenerationParams(num_beams=num_beams, max_new_tokens=5, suppress_tokens=tuple(range(VOCAB)))
    source = tuple(random_sources(1, seed=1)[0])
    assert oracle(tiny_model(seed=3), source, params).tokens == []
    sequence, neighbour = Sequence(source, params), Sequence(source, replace(params, suppress_tokens=()))
    run(Engine.from_folder(tiny_folder, EngineConfig()), [sequence, neighbour])
    assert outcome_of(sequence).tokens == []
    assert outcome_of(neighbour).tokens == oracle(tiny_model(seed=3), source, neighbour.params).tokens


@pytest.mark.parametrize("seed", range(12))
def test_the_reference_with_one_group_equals_generate(seed: int) -> None:
    rng = random.Random(seed)
    recipe = recipe_for(seed, rng)
    model = recipe.model()
    source = tuple(random_sources(1, seed)[0])
    params = random_params(rng)
    expected = oracle(model, source, params)
    ours = search([next_scores(model, source, params)], params).outcome
    assert classify(recipe, source, params, ours, expected, [Computed(next_logits(model, source))]).accepted


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_without_a_penalty_are_copies_of_a_narrow_beam_search(groups: int, tiny_folder: Path) -> None:
    params = GenerationParams(num_beams=2, num_return_sequences=2, max_new_tokens=12)
    source = tuple(random_sources(1, seed=2)[0])
    narrow = Sequence(source, params)
    copies = Sequence(
        source, replace(params, num_beams=2 * groups, num_return_sequences=2 * groups, num_beam_groups=groups)
    )
    run(Engine.from_folder(tiny_folder, EngineConfig()), [narrow, copies])
    expected = [tokens for tokens in outcome_of(narrow).tokens for _ in range(groups)]
    assert outcome_of(copies).tokens == expected


def test_a_diversity_penalty_makes_groups_say_other_things(tiny_folder: Path) -> None:
    params = GenerationParams(
        num_beams=4, num_return_sequences=4, max_new_tokens=12, num_beam_groups=4, diversity_penalty=100.0
    )
    sequence = Sequence(tuple(random_sources(1, seed=2)[0]), params)
    run(Engine.from_folder(tiny_folder, EngineConfig()), [sequence])
    assert len({tokens[0] for tokens in outcome_of(sequence).tokens}) == 4


class Computed(dict[tuple[int, ...], Tensor]):
    """Logits that are computed when asked for, in the place of those that an engine had."""

    def __init__(self, logits: NextLogits) -> None:
        super().__init__()
        self.logits = logits

    def __missing__(self, tokens: tuple[int, ...]) -> Tensor:
        self[tokens] = self.logits(tokens)
        return self[tokens]


# Behind some prefixes the relu in its head lets nothing through, and all tokens have the same score: fp32's accident.
TIES = Recipe(458, 12.0, TinyShape(256, 8, 1, 1, 32, 2, 2, 100, "relu", -1.0))
TIE_PARAMS = GenerationParams(num_beams=2, max_new_tokens=20, min_new_tokens=6, length_penalty=2.0)


@dataclass(frozen=True)
class Tie:
    """A text of which noise decides; `logits` are transformers' own, a little off, and `ours` follows from them."""

    source: tuple[int, ...]
    logits: Mapping[tuple[int, ...], Tensor]
    ours: Outcome
    theirs: Outcome

    def judge(self, **changed: Any) -> Verdict:
        case = replace(self, **changed)
        return classify(TIES, self.source, TIE_PARAMS, case.ours, case.theirs, [case.logits])


def follows(source: tuple[int, ...], logits: Mapping[tuple[int, ...], Tensor], params: GenerationParams) -> Outcome:
    scores = processed(logits.__getitem__, TIES.model(), source, params)
    return search([scores], params, [Arithmetic(fp32)]).outcome


def with_another_token(outcome: Outcome) -> Outcome:
    ((first, *rest),) = outcome.tokens
    return outcome._replace(tokens=[[first ^ 1, *rest]])


def noisy(plain: NextLogits, noise: torch.Generator, said: tuple[int, ...]) -> Tensor:
    row = plain(said)
    return row + 2e-7 * torch.randn(row.shape, generator=noise)


@pytest.fixture(scope="module")
def tie() -> Tie:
    for number, ids in enumerate(random_sources(40, 458, 60, 256)):
        source, noise = tuple(ids), torch.Generator().manual_seed(number)
        plain = next_logits(TIES.model(), source)
        logits = Computed(partial(noisy, plain, noise))
        ours = follows(source, logits, TIE_PARAMS)
        found = Tie(source, logits, ours, oracle(TIES.model(), source, TIE_PARAMS))
        if found.judge().kind == "noise":
            return replace(found, logits=dict(logits))
    pytest.fail("no tie")


def test_classify_accepts_an_outcome_that_is_equal_or_that_fp64_gives_and_no_other() -> None:
    recipe, params = Recipe(3, 6.0, TinyShape()), GenerationParams(num_beams=3, max_new_tokens=8)
    source = tuple(random_sources(1, seed=4)[0])
    logits = [Computed(next_logits(recipe.model(), source))]
    theirs = oracle(recipe.model(), source, params)
    assert classify(recipe, source, params, theirs, theirs, logits).kind == "equal"
    two = oracle(recipe.model(), source, replace(params, num_return_sequences=2))
    wrong = Outcome(two.tokens[1:], two.scores[1:], two.token_logprobs[1:])
    assert classify(recipe, source, params, wrong, theirs, logits).kind == "mismatch"
    # Ours right and the other side wrong: the fp64 copy says so, if it says our scores, too.
    assert classify(recipe, source, params, theirs, wrong, logits).kind == "fp64"
    off = theirs._replace(scores=[score + 0.01 for score in theirs.scores])
    for other in (theirs, wrong):
        assert classify(recipe, source, params, off, other, logits).kind == "mismatch"


def test_classify_accepts_a_tie_within_noise(tie: Tie) -> None:
    verdict = tie.judge()
    assert verdict.kind == "noise"
    assert verdict.margin <= 2 * verdict.difference < 1e-4
    assert 0 < verdict.noise <= 2 * verdict.others_noise < 1e-3


def test_tokens_that_do_not_follow_from_the_logits_are_no_tie(tie: Tie) -> None:
    assert tie.judge(ours=with_another_token(tie.ours)).kind == "mismatch"


def test_scores_that_do_not_follow_from_the_logits_are_no_tie(tie: Tie) -> None:
    ours = tie.ours
    assert tie.judge(ours=ours._replace(scores=[score + 0.01 for score in ours.scores])).kind == "mismatch"
    ((first, *rest),) = ours.token_logprobs
    assert tie.judge(ours=ours._replace(token_logprobs=[[first + 0.01, *rest]])).kind == "mismatch"


def test_a_wrong_logit_is_no_tie(tie: Tie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "RANDOM_RUNS", 2)  # each takes seconds
    # The search is right, and its outcome follows from the logits; one of them is 0.01 off.
    first = tie.logits[START,].clone()
    first[tie.ours.tokens[0][0]] += 0.01
    plain = next_logits(TIES.model(), tie.source)
    logits = Computed(lambda said: first if said == (START,) else plain(said))
    verdict = tie.judge(ours=follows(tie.source, logits, TIE_PARAMS), logits=logits)
    assert verdict.kind == "mismatch"
    assert verdict.noise > 0.005
    assert verdict.noise > 10 * verdict.others_noise


def test_runs_that_round_at_random_explain_what_one_draw_does_not(tie: Tie, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, usual = next_scores(TIES.model(), tie.source, TIE_PARAMS), tie.judge()
    monkeypatch.setattr(parity, "NOISE_RATIO", usual.noise / usual.others_noise / 2)
    asked = []

    def drawn(model: Any, source: Any, params: Any, seed: int) -> NextScores:
        asked.append(seed)
        return plain if seed < 2 else lambda said: [score + 5 * usual.others_noise for score in plain(said)]

    monkeypatch.setattr(parity, "rounded_at_random", drawn)
    assert tie.judge().kind == "noise"
    assert asked == [0, 1, 2]
    monkeypatch.setattr(parity, "RANDOM_RUNS", 2)
    assert tie.judge().kind == "mismatch"


def test_a_prefix_that_the_engine_did_not_decode_proves_nothing(tie: Tie) -> None:
    for missing in ((START,), max(tie.logits, key=len)):
        verdict = tie.judge(logits={tokens: row for tokens, row in tie.logits.items() if tokens != missing})
        assert (verdict.kind, verdict.noise) == ("mismatch", math.inf)


def test_an_oracle_that_contradicts_its_own_scores_proves_nothing(tie: Tie) -> None:
    assert tie.judge(theirs=with_another_token(tie.theirs)).kind == "mismatch"


def swapped(outcome: Outcome, first: int) -> Outcome:
    def exchange(rows: list[Any]) -> list[Any]:
        return [*rows[:first], rows[first + 1], rows[first], *rows[first + 2 :]]

    return Outcome(*(exchange(rows) for rows in outcome))


@pytest.mark.parametrize("groups", [1, 2])
def test_results_whose_order_alone_differs_are_a_tie_if_their_scores_are_one(groups: int) -> None:
    params = replace(TIE_PARAMS, num_beams=2 * groups, num_beam_groups=groups, num_return_sequences=2)
    params = replace(params, diversity_penalty=0.5 if groups > 1 else 0.0)
    judged = set()
    for ids in random_sources(40, 458, 60, 256):
        source = tuple(ids)
        theirs = expected_outcome(TIES.model(), source, params)
        is_tie = theirs.scores[0] == theirs.scores[1]
        if is_tie in judged:
            continue
        logits = Computed(next_logits(TIES.model(), source))
        verdict = classify(TIES, source, params, swapped(theirs, 0), theirs, [logits] * groups)
        assert verdict.kind == ("noise" if is_tie else "mismatch"), (verdict, theirs)
        judged.add(is_tie)
        if len(judged) == 2:
            return
    pytest.fail("all are ties, or none is")


@pytest.mark.parametrize("draw", [random_params, random_diverse_params])
def test_the_recorder_keeps_what_the_engine_chose_from(draw: Any, tmp_path: Path) -> None:
    # In flight with others, in few slots: the search over what was kept gives the engine's tokens and its scores.
    rng = random.Random(5)
    model = tiny_model(seed=5)
    sequences = [Sequence(tuple(ids), draw(rng)) for ids in random_sources(12, seed=5)]
    with Recorder() as recorder:
        run(Engine.from_folder(save(model, tmp_path), EngineConfig(max_num_seqs=3)), sequences)
    for sequence in sequences:
        kept, params, ours = recorder.logits(sequence), sequence.params, outcome_of(sequence)
        scores = [processed(rows.__getitem__, model, sequence.source_ids, params, as_the_engine) for rows in kept]
        found = search(scores, params, [Arithmetic(fp32, chosen(rows, ours)) for rows in kept]).outcome
        assert found.tokens == ours.tokens
        assert worst_difference(ours, found, 2e-6, 2e-6) <= 0
