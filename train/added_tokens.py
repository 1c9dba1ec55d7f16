"""Words that become one token each, such as the names of a data set's speakers; each begins as the mean of its pieces.

BERT's vocabulary makes four tokens of `#Person1#`, which are 18 % of DialogSum's source tokens. Knows tokenizers and
rows of embeddings, and how summaries of others spell such a word. Does not know how two checkpoints are joined, or
trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.tokenizer_pair import AnyTokenizer, TokenizerPair, summary_tokenizer


def add_tokens(
    encoder: PreTrainedModel, decoder: PreTrainedModel, tokenizer: AnyTokenizer, words: Sequence[str]
) -> None:
    """Make each of `words` one token of both sides; what is one token already stays as it is.

    A word of letters or digits is that token only where it stands by itself, not within a longer one.

    Raises:
        ValueError: a word that is empty, or begins or ends with white space, which a tokenizer may drop; that a
            tokenizer does not see at all; or two that are one to it.
    """
    for word in words:
        if not word or word != word.strip():
            raise ValueError(f"a token to add must be a word without white space at its ends; it is {word!r}")
    pieces = _add(summary_tokenizer(tokenizer), words)
    grow(decoder, pieces)
    grow(encoder, _add(tokenizer.source, words) if isinstance(tokenizer, TokenizerPair) else pieces)


def same_vocabulary(one: AnyTokenizer, other: AnyTokenizer) -> bool:
    """Whether every id of sources, and of summaries, is the same word."""
    sources = [side.source if isinstance(side, TokenizerPair) else side for side in (one, other)]
    targets = [summary_tokenizer(side) for side in (one, other)]
    return all(a.get_vocab() == b.get_vocab() for a, b in (sources, targets))


def rejoin(texts: Sequence[str], tokenizer: AnyTokenizer) -> list[str]:
    """Summaries with each added word in one piece, where a model without that token wrote it in several.

    BERT's tokenizer decodes `#Person1#` as `# person1 #`, which is not the added token: a student of such summaries
    would learn to say both.

    Args:
        tokenizer: with the added tokens; the case of a word counts where it does to this tokenizer.
    """
    target = summary_tokenizer(tokenizer)
    joined = list(texts)
    for word in sorted(set(target.get_added_vocab()) - set(target.all_special_tokens)):
        if (spelling := _spelled_apart(target, word)) is not None:
            once = word.replace("\\", r"\\")
            joined = [spelling.sub(once, text) for text in joined]
    return joined


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


def _spelled_apart(tokenizer: PreTrainedTokenizerBase, word: str) -> re.Pattern[str] | None:
    """The word as its parts with white space between them or not; None where it has one part, or other letters.

    As it stands, and as the tokenizer reads it: uncased, BERT's drops accents too.
    """
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return None
    normalise = backend.normalizer.normalize_str if backend.normalizer is not None else str
    spellings = []
    for form in dict.fromkeys((word, normalise(word))):
        parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(form)]
        if len(parts) > 1 and "".join(parts) == form:
            spellings.append(r"\s*".join(map(re.escape, parts)))
    if not spellings:
        return None
    before, behind = r"(?<!\w)" if word[0].isalnum() else "", r"(?!\w)" if word[-1].isalnum() else ""
    folds = normalise(word.lower()) == normalise(word.upper())
    return re.compile(f"{before}(?:{'|'.join(spellings)}){behind}", re.IGNORECASE if folds else 0)


def _add(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[int, list[int]]:
    """Of each new token, the ids that its word had."""
    known, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    before: dict[str, list[int]] = {}
    for word in dict.fromkeys(words):
        pieces: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
        if word in known or (len(pieces) == 1 and pieces[0] != unknown):
            continue
        if not pieces:
            raise ValueError(f"the tokenizer sees nothing in {word!r}")
        for other, others in before.items():
            if others == pieces and unknown not in pieces:
                raise ValueError(f"to the tokenizer {word!r} is the same as {other!r}")
        before[word] = pieces
    alone = {word: word[0].isalnum() and word[-1].isalnum() for word in before}
    tokenizer.add_tokens([AddedToken(word, single_word=single) for word, single in alone.items()])
    return {tokenizer.convert_tokens_to_ids(word): pieces for word, pieces in before.items()}
