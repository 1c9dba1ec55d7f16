"""Each processor against its counterpart in transformers, with different options and lengths in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from app.engine import FORCED, GenerationParams
from app.engine.logits_processors import process
from app.engine.slot_options import ActiveOptions, SlotOptions

VOCAB, PADDED, WIDTH, BEAMS, EOS = 7, 9, 12, 2, 2
TOKENS = st.integers(0, VOCAB - 1)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
    "no_repeat_ngram_size": st.integers(0, 4),
    "encoder_no_repeat_ngram_size": st.integers(0, 4),
    "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4, unique=True).map(tuple),
    "min_new_tokens": st.integers(0, WIDTH + 2),
    "forced_bos_token_id": st.none() | TOKENS,
    "forced_eos_token_id": st.none() | TOKENS,
    "suppress_tokens": st.lists(TOKENS, max_size=3).map(tuple),
    "begin_suppress_tokens": st.lists(TOKENS, max_size=3).map(tuple),
}


def reference(params: GenerationParams, source: torch.Tensor) -> LogitsProcessorList:
    """transformers' processors of these options, in the order of its `_get_logits_processor`."""
    chosen = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    if params.no_repeat_ngram_size:
        chosen.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.encoder_no_repeat_ngram_size:
        chosen.append(EncoderNoRepeatNGramLogitsProcessor(params.encoder_no_repeat_ngram_size, source[None]))
    if params.bad_words_ids and any(word != (EOS,) for word in params.bad_words_ids):
        chosen.append(NoBadWordsLogitsProcessor([list(word) for word in params.bad_words_ids], EOS))
    chosen.append(MinNewTokensLengthLogitsProcessor(1, params.min_new_tokens, EOS))
    if params.forced_bos_token_id is not None:
        chosen.append(ForcedBOSTokenLogitsProcessor(params.forced_bos_token_id))
    if params.forced_eos_token_id is not None:
        chosen.append(ForcedEOSTokenLogitsProcessor(params.max_new_tokens + 1, params.forced_eos_token_id))
    if params.suppress_tokens:
        chosen.append(SuppressTokensLogitsProcessor(list(params.suppress_tokens)))
    if params.begin_suppress_tokens:
        begin = 1 if params.forced_bos_token_id is None else 2
        chosen.append(SuppressTokensAtBeginLogitsProcessor(list(params.begin_suppress_tokens), begin))
    return chosen


def drawn_params(draw: Callable[..., Any], names: tuple[str, ...]) -> GenerationParams:
    """Of any values; no token is both forced and suppressed, which is refused."""
    options = {name: draw(OPTIONS[name]) for name in names}
    if "suppress_tokens" in options:
        forced = [options.get(name) for name in FORCED]
        options["suppress_tokens"] = tuple(token for token in options["suppress_tokens"] if token not in forced)
    return GenerationParams(max_new_tokens=draw(st.integers(1, WIDTH)), **options)


def check(draw: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Several sequences of different options, lengths and sources at once, against transformers one by one."""
    lengths = draw(st.lists(st.integers(1, WIDTH), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    said = torch.randint(VOCAB, (len(lengths), BEAMS, WIDTH), generator=generator)
    scores = torch.randn(len(lengths), BEAMS, VOCAB, generator=generator)
    params = [drawn_params(draw, names) for _ in lengths]
    sources = [torch.randint(VOCAB, (draw(st.integers(1, WIDTH)),), generator=generator) for _ in lengths]
    options = SlotOptions.empty(len(lengths), WIDTH, WIDTH + 1, torch.device("cpu"))
    for slot, (source, wanted) in enumerate(zip(sources, params, strict=True)):
        options.start([(source.tolist(), wanted)], slot, EOS)
    active = ActiveOptions.of(params, lengths, target=max(lengths), source=WIDTH, ragged=True)
    padded = torch.nn.functional.pad(scores, (0, PADDED - VOCAB), value=-torch.inf)
    ours = process(padded, said, torch.tensor(lengths), options, active, EOS)
    for row, (length, wanted) in enumerate(zip(lengths, params, strict=True)):
        expected = reference(wanted, sources[row])(said[row, :, :length], scores[row].clone())
        torch.testing.assert_close(ours[row, :, :VOCAB], expected, msg=str(wanted))
        assert (ours[row, :, VOCAB:] == -torch.inf).all()


@pytest.mark.parametrize("name", OPTIONS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_each_processor_equals_transformers(name: str, data: st.DataObject) -> None:
    check(data.draw, (name,))


@settings(deadline=None)
@given(st.data())
def test_all_processors_together_equal_transformers(data: st.DataObject) -> None:
    check(data.draw, tuple(OPTIONS))
