"""Each processor against its counterpart in transformers, with different options and lengths in one batch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from app.engine.logits_processors import ban_early_end, ban_repeated_ngrams, penalise_repetition

VOCAB, WIDTH, BEAMS = 7, 12, 2


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [S, K, V], what was said [S, K, T] over a tiny vocabulary, and lengths [S]."""
    lengths = draw(st.lists(st.integers(1, WIDTH), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    said = torch.randint(VOCAB, (len(lengths), BEAMS, WIDTH), generator=generator)
    return torch.randn(len(lengths), BEAMS, VOCAB, generator=generator), said, torch.tensor(lengths)


@settings(deadline=None)
@given(batches(), st.data())
def test_repetition_penalty(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], data: st.DataObject) -> None:
    scores, said, lengths = batch
    penalties = [data.draw(st.sampled_from([1.0, 1.3, 0.7])) for _ in lengths]
    ours = penalise_repetition(scores, said, lengths, torch.tensor(penalties))
    for row, (length, penalty) in enumerate(zip(lengths.tolist(), penalties, strict=True)):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(said[row, :, :length], scores[row].clone())
        torch.testing.assert_close(ours[row], expected)


@settings(deadline=None)
@given(batches(), st.data())
def test_no_repeat_ngram(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], data: st.DataObject) -> None:
    scores, said, lengths = batch
    sizes = [data.draw(st.integers(0, 4)) for _ in lengths]
    ours = ban_repeated_ngrams(scores, said, lengths, torch.tensor(sizes), max(sizes))
    for row, (length, size) in enumerate(zip(lengths.tolist(), sizes, strict=True)):
        expected = scores[row].clone()
        if size:
            expected = NoRepeatNGramLogitsProcessor(size)(said[row, :, :length], expected)
        torch.testing.assert_close(ours[row], expected)


@settings(deadline=None)
@given(batches(), st.data())
def test_min_new_tokens(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], data: st.DataObject) -> None:
    scores, said, lengths = batch
    minimums = [data.draw(st.integers(0, WIDTH + 2)) for _ in lengths]
    ours = ban_early_end(scores, lengths, torch.tensor(minimums), eos_token_id=2)
    for row, (length, minimum) in enumerate(zip(lengths.tolist(), minimums, strict=True)):
        processor = MinNewTokensLengthLogitsProcessor(1, minimum, 2)
        torch.testing.assert_close(ours[row], processor(said[row, :, :length], scores[row].clone()))
