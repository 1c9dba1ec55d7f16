"""A tokenizer for sources and another for summaries, in one object that stands where transformers expects one.

Knows special tokens and what a label is. Does not know models or data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from app.engine.checkpoint import DECODER_TOKENIZER

PADDING = "<|pad|>"


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained with; the message says why."""


class TokenizerPair:
    """Encodes sources with one tokenizer, and encodes and decodes summaries with another.

    `pair(texts)` is for sources, `pair(text_target=texts)` for summaries, as transformers has it; `decode` is for
    summaries, `pad` for sources. What it does not define is the source's.

    Attributes:
        start_id: what the decoder starts from.
    """

    def __init__(
        self, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, start_id: int | None = None
    ) -> None:
        self.source = source
        self.target = target
        self.start_id: int = first_id(target) if start_id is None else start_id

    def __call__(self, text: Any = None, text_target: Any = None, **options: Any) -> Any:
        """Ids of sources, or of summaries if those are given."""
        if text is None:
            return self.target(text_target, **options)
        return self.source(text, **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        """Text of summaries."""
        return self.target.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> Any:
        """Texts of summaries."""
        return self.target.batch_decode(*args, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """The source's where one tokenizer stands, and the summaries' below `decoder_tokenizer`."""
        self.source.save_pretrained(folder, **options)
        if self.target is not self.source:
            self.target.save_pretrained(Path(folder) / DECODER_TOKENIZER, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("source", "target", "start_id")
        object.__setattr__(self if own else self.source, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("source", "target"):  # not there yet: an object being unpickled or copied
            raise AttributeError(name)
        return getattr(self.source, name)


AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | TokenizerPair"


def load_tokenizer(name: str) -> AnyTokenizer:
    """A folder's tokenizer, or its pair, or a hub id's; neither cuts nor pads by itself (all-MiniLM-L6-v2 ships both).

    Raises:
        TokenizerError: no fast tokenizer, or no end or padding token.
    """
    source = _load(name)
    if (Path(name) / DECODER_TOKENIZER).is_dir():
        return TokenizerPair(source, load_summary_tokenizer(str(Path(name) / DECODER_TOKENIZER)))
    _check(source, name, "end", "padding")
    return source


def load_summary_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A decoder's own tokenizer: every text ends with its end token, and padding is a token of its own.

    GPT-2's has neither: it adds no end token, and whoever pads with the end token hides the start token, which is the
    same, behind the mask.

    Raises:
        TokenizerError: no fast tokenizer, or no start or end token.
    """
    tokenizer = _load(name)
    _check(tokenizer, name, "start", "end")
    end = last_id(tokenizer)
    ends = tokenizer("a")["input_ids"][-1:] == [end]
    has_padding = tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in (end, first_id(tokenizer))
    if ends and has_padding:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if not ends:
        word = backend.id_to_token(end)
        adds_end = processors.TemplateProcessing(single=f"$A {word}", special_tokens=[(word, end)])
        held = [backend.post_processor] if backend.post_processor is not None else []
        backend.post_processor = processors.Sequence([*held, adds_end])
    names = ("unk_token", "bos_token", "eos_token", "cls_token", "sep_token", "pad_token")
    special = {name: str(token) for name in names if (token := getattr(tokenizer, name)) is not None}
    if not has_padding:
        special["pad_token"] = PADDING
    # The plain class keeps the file as it is; GPT-2's own would build its post-processor anew.
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def summary_tokenizer(tokenizer: AnyTokenizer) -> PreTrainedTokenizerBase:
    """The one for summaries, of a pair; any other serves both."""
    return tokenizer.target if isinstance(tokenizer, TokenizerPair) else tokenizer


def first_id(tokenizer: AnyTokenizer) -> int:
    """[CLS], or its equal: what the decoder starts from."""
    if isinstance(tokenizer, TokenizerPair):
        return tokenizer.start_id
    return tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id


def last_id(tokenizer: AnyTokenizer) -> int:
    """[SEP], or its equal: what ends a summary."""
    own = summary_tokenizer(tokenizer)
    return own.sep_token_id if own.sep_token_id is not None else own.eos_token_id


def label_ids(tokenizer: AnyTokenizer, summaries: Sequence[str], max_length: int) -> list[list[int]]:
    """What the decoder has to say of each summary: without the token it starts from, with its end token also when cut.

    Where the decoder starts from another token than texts begin with (BART: from </s>, texts with <s>), it has to say
    that first token too.

    Args:
        max_length: in tokens, the start token included, as `max_length` of `generate` counts.

    Raises:
        TokenizerError: a text does not end with the end token.
    """
    start, end = first_id(tokenizer), last_id(tokenizer)
    found = tokenizer(
        text_target=list(summaries),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    labels = [ids[1:] if ids[0] == start else _cut(ids, max_length - 1) for ids in found]
    if any(ids[-1] != end for ids in labels):
        raise TokenizerError("a label does not end with the end token; does the tokenizer's post-processor add it?")
    return labels


def _cut(ids: list[int], length: int) -> list[int]:
    """At most so many, the last one among them."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _load(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise TokenizerError(f"{name} has no fast tokenizer; the service needs tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerBase, name: str, *roles: str) -> None:
    found = {"start": first_id(tokenizer), "end": last_id(tokenizer), "padding": tokenizer.pad_token_id}
    for role in roles:
        if found[role] is None:
            raise TokenizerError(f"the tokenizer of {name} has no {role} token")
