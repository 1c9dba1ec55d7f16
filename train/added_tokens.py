"""Words that become one token each, such as the names of a data set's speakers; each begins as the mean of its pieces.

BERT's vocabulary makes four tokens of `#Person1#`, which are 18 % of DialogSum's source tokens. Knows tokenizers and
rows of embeddings. Does not know how two checkpoints are joined, or trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.tokenizer_pair import AnyTokenizer, TokenizerPair, summary_tokenizer


def add_tokens(
    encoder: PreTrainedModel, decoder: PreTrainedModel, tokenizer: AnyTokenizer, words: Sequence[str]
) -> None:
    """Make each of `words` one token of both sides; words that are a token already stay as they are.

    Raises:
        ValueError: a word that is empty, or begins or ends with white space, which a tokenizer may drop.
    """
    for word in words:
        if not word or word != word.strip():
            raise ValueError(f"a token to add must be a word without white space at its ends; it is {word!r}")
    pieces = _add(summary_tokenizer(tokenizer), words)
    grow(decoder, pieces)
    grow(encoder, _add(tokenizer.source, words) if isinstance(tokenizer, TokenizerPair) else pieces)


def added_tokens(tokenizer: AnyTokenizer) -> list[str]:
    """What stands beside a tokenizer's vocabulary, special tokens among them, in the order of the ids."""
    added = summary_tokenizer(tokenizer).get_added_vocab()
    return sorted(added, key=added.__getitem__)


def same_vocabulary(one: AnyTokenizer, other: AnyTokenizer) -> bool:
    """Whether every id of sources, and of summaries, is the same word."""
    sources = [side.source if isinstance(side, TokenizerPair) else side for side in (one, other)]
    targets = [summary_tokenizer(side) for side in (one, other)]
    return all(a.get_vocab() == b.get_vocab() for a, b in (sources, targets))


def grow(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """Give new tokens a row of the embeddings, and of the LM head and its bias: the mean of their pieces' rows.

    Args:
        pieces: of each new id, the ids of what it was before.
    """
    if not pieces:
        return
    rows = max(pieces) + 1
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight]
    if head is not None:
        tables += [table for table in (head.weight, head.bias) if table is not None and table is not tables[0]]
    with torch.no_grad():
        for table in tables:
            for new, old in pieces.items():
                table[new] = table[list(old)].mean(0)


def _add(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[int, list[int]]:
    """Of each new token, the ids that its word had."""
    known = tokenizer.get_vocab()
    before = {
        word: tokenizer(word, add_special_tokens=False)["input_ids"]
        for word in dict.fromkeys(words)
        if word not in known
    }
    tokenizer.add_tokens(list(before))
    return {tokenizer.convert_tokens_to_ids(word): pieces for word, pieces in before.items()}
