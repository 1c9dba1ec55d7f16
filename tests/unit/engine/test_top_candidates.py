"""The choice over blocks against a plain top-k over everything."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.engine.top_candidates import BLOCK, top_candidates

# Of the first beam's tokens: all, a few, the last one of the vocabulary.
ALLOWED = (slice(None), slice(0, 3), slice(-1, None))


def scores_of(size: int, beams: int, vocab_size: int, seed: int) -> torch.Tensor:
    """[S, K, V] with columns of -inf behind the vocabulary."""
    made = torch.randn(size, beams, vocab_size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(made, (0, BLOCK - vocab_size % BLOCK), value=-torch.inf)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(10, 300), st.integers(0, 2**31), st.sampled_from(ALLOWED))
@example(size=1, beams=4, vocab_size=2 * BLOCK + 1, seed=0, allowed=slice(-1, None))
def test_blocks_choose_what_a_plain_top_k_chooses(
    size: int, beams: int, vocab_size: int, seed: int, allowed: slice
) -> None:
    scores = scores_of(size, beams, vocab_size, seed)
    kept = scores[:, 0, :vocab_size][:, allowed].clone()
    scores[:, 0] = -torch.inf
    scores[:, 0, :vocab_size][:, allowed] = kept
    beam_scores = torch.randn(size, beams, generator=torch.Generator().manual_seed(seed + 1))
    found = top_candidates(scores, beam_scores, 2 * beams, vocab_size)
    values, index = (scores + beam_scores[:, :, None]).flatten(1).topk(2 * beams)
    assert torch.equal(found.scores, values)
    real = values.isfinite()  # among the forbidden any will do, as long as it is a token
    assert torch.equal(found.rows[real], (index // scores.shape[-1])[real])
    assert torch.equal(found.tokens[real], (index % scores.shape[-1])[real])
    assert (found.tokens < vocab_size).all()


def test_noise_chooses_but_does_not_count() -> None:
    scores = scores_of(1, 2, 50, seed=0)
    noise = torch.zeros_like(scores)
    noise[0, 1, 7] = 100.0
    found = top_candidates(scores, torch.tensor([[0.5, 0.25]]), 1, 50, scores + noise)
    assert (found.rows.item(), found.tokens.item()) == (1, 7)
    assert found.token_logprobs.item() == scores[0, 1, 7]
    assert found.scores.item() == scores[0, 1, 7] + 0.25
