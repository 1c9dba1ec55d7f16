"""The best continuations of a sequence's beams, found without sorting or copying the vocabulary.

The k best of K * V scores lie in the k blocks with the greatest maxima: one pass takes the maximum of every block, and
the exact choice looks at k blocks only. Does not know what the scores are or what is done with the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Columns of scores are a multiple of it.
BLOCK = 64


@dataclass(frozen=True)
class Candidates:
    """k continuations of each of S sequences, in the order of choice: best first, or first drawn first."""

    scores: Tensor  # [S, k]: token_logprobs + the beam's own score
    token_logprobs: Tensor  # [S, k]
    rows: Tensor  # [S, k] int64: the beam that goes on
    tokens: Tensor  # [S, k] int64


def top_candidates(
    scores: Tensor, beam_scores: Tensor, k: int, vocab_size: int, ranked: Tensor | None = None
) -> Candidates:
    """Choose k of the K * V continuations of each sequence.

    Args:
        scores: [S, K, V] fp32; V is a multiple of BLOCK.
        beam_scores: [S, K], added to every score of the beam.
        k: at most K * vocab_size.
        vocab_size: columns from here on are no tokens; they hold -inf.
        ranked: [S, K, V], what is compared where that is not the scores: they and noise.
    """
    compared = scores if ranked is None else ranked
    blocks = compared.view(*compared.shape[:2], -1, BLOCK)  # [S, K, B, BLOCK]
    blocks_a_row = blocks.shape[2]
    maxima = (blocks.amax(-1) + beam_scores[:, :, None]).flatten(1)  # [S, K * B]
    chosen = maxima.topk(min(k, maxima.shape[1]), sorted=False).indices  # [S, c]
    inside = blocks.flatten(1, 2).gather(1, chosen[:, :, None].expand(-1, -1, BLOCK))  # [S, c, BLOCK]
    sums = inside + beam_scores.gather(1, chosen // blocks_a_row)[:, :, None]
    best = sums.flatten(1).topk(k).indices  # [S, k] into c * BLOCK
    block = chosen.gather(1, best // BLOCK)
    rows = block // blocks_a_row
    columns = block % blocks_a_row * BLOCK + best % BLOCK
    token_logprobs = scores.flatten(1).gather(1, rows * scores.shape[-1] + columns)
    # Where everything is banned, a column that is no token may be among the best; nobody must ever read it as one.
    tokens = columns.clamp(max=vocab_size - 1)
    return Candidates(token_logprobs + beam_scores.gather(1, rows), token_logprobs, rows, tokens)
