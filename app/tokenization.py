"""Text to ids and back, and the one place of the token limit: what fits, what is cut, what is refused.

Knows `tokenizer.json`, of any model of the tokenizers library, and that summaries may have a tokenizer of their own.
Does not know the engine, HTTP, or where the limit comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder

from app.errors import InputTooLong, InvalidRequest, ModelCorrupt

# The decoder's tokenizer, in a folder whose encoder and decoder have one each.
DECODER_TOKENIZER = "decoder_tokenizer/tokenizer.json"
Pointer = Callable[[int], str]


def input_pointer(index: int) -> str:
    """Where text `index` stands in a request whose `inputs` is a list."""
    return f"/inputs/{index}"


@dataclass(frozen=True)
class TokenCount:
    """A text held against the limit; special tokens count.

    Attributes:
        excess: tokens over the limit, 0 if it fits.
        cut_at_char: the text's first `cut_at_char` code points are the longest prefix of whole tokens that fits; None
            if all of it does.
    """

    tokens: int
    limit: int
    excess: int
    cut_at_char: int | None


@dataclass(frozen=True)
class EncodedText:
    """What the encoder reads: `[CLS] ... [SEP]`, at most `limit` ids; `source_tokens` counts before any cut."""

    ids: tuple[int, ...]
    source_tokens: int

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut off."""
        return len(self.ids) < self.source_tokens


class Tokenizer:
    """A tokenizer with a limit. Safe to use from several threads.

    Args:
        backend: of sources.
        limit: in tokens, special tokens included.
        decoder: of summaries, where that is another one.
    """

    def __init__(self, backend: BackendTokenizer, limit: int, decoder: BackendTokenizer | None = None) -> None:
        # Checkpoints ship both, at any length (all-MiniLM-L6-v2: 128); here they would cut silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._decoder = backend if decoder is None else decoder
        has_pieces = isinstance(self._decoder.decoder, WordPieceDecoder)
        self._raw_decoder = WordPieceDecoder(cleanup=False) if has_pieces else None
        self.limit = limit
        self.num_special_tokens: int = backend.num_special_tokens_to_add(False)

    @classmethod
    def from_folder(cls, folder: Path, limit: int) -> Tokenizer:
        """Read `tokenizer.json`, and the decoder's where there is one.

        Raises:
            ModelCorrupt: one is missing or cannot be read.
        """
        decoder = folder / DECODER_TOKENIZER
        # The folder says that there is one, as for the engine.
        return cls(_read(folder / "tokenizer.json"), limit, _read(decoder) if decoder.parent.exists() else None)

    def count(self, texts: Sequence[str], pointer: Pointer = input_pointer) -> list[TokenCount]:
        """Hold each text against the limit. A text without source tokens counts its special tokens.

        Raises:
            InvalidRequest: a text holds a lone surrogate.
        """
        check_unicode(texts, pointer)
        return [self._count(text, encoding) for text, encoding in zip(texts, self._encode(texts), strict=True)]

    def encode(
        self, texts: Sequence[str], overflow: str = "error", pointer: Pointer = input_pointer
    ) -> list[EncodedText]:
        """Ids for the encoder.

        Args:
            overflow: for texts over the limit; "error" refuses, "truncate_tail" keeps the beginning,
                "truncate_head" the end.
            pointer: where text `i` stands in the request, for error messages.

        Raises:
            InvalidRequest: a text holds a lone surrogate or no source token; every such text is named.
            InputTooLong: texts are over the limit and may not be cut; every such text is named.
        """
        check_unicode(texts, pointer)
        encodings = self._encode(texts)
        _refuse(
            (
                (i, "has nothing to summarise")
                for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True))
                # Byte-level tokenizers have tokens for spaces.
                if not encoding.ids or text.isspace()
            ),
            pointer,
        )
        if overflow == "error":
            self._refuse_too_long(texts, encodings, pointer)
        return [self._finish(encoding, overflow) for encoding in encodings]

    def decode(self, token_ids: Sequence[int], clean_up_spaces: bool | None = None) -> str:
        """Text without special tokens.

        Args:
            clean_up_spaces: remove the spaces that tokenisation put before punctuation; None is what the checkpoint's
                tokenizer does.
        """
        text: str
        if clean_up_spaces is False and self._raw_decoder is not None:
            special = {i for i, token in self._decoder.get_added_tokens_decoder().items() if token.special}
            tokens = [self._decoder.id_to_token(i) for i in token_ids if i not in special]
            text = self._raw_decoder.decode([token for token in tokens if token is not None])
        else:
            text = self._decoder.decode(list(token_ids), skip_special_tokens=True)
        return clean_up(text) if clean_up_spaces else text

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Content only. NUL is removed by the normaliser, so offsets are those of the text as given."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    @property
    def _room(self) -> int:
        return self.limit - self.num_special_tokens

    def _count(self, text: str, encoding: Encoding) -> TokenCount:
        tokens = len(encoding.ids) + self.num_special_tokens
        excess = max(0, tokens - self.limit)
        return TokenCount(tokens, self.limit, excess, self._cut_at_char(text, encoding.offsets) if excess else None)

    def _cut_at_char(self, text: str, offsets: Sequence[tuple[int, int]]) -> int:
        """The end of the last token that fits, whole characters only: a Hangul syllable is up to three tokens.

        Where NFD reorders combining marks, the library's offsets are out of order, and the prefix that they name may
        hold more tokens than the text had there: it is encoded by itself, and gives way until it fits.
        """
        fits = self._room
        while fits > 0:
            if offsets[fits][0] < offsets[fits - 1][1]:
                fits -= 1
                continue
            cut = offsets[fits - 1][1]
            tokens = len(self._encode([text[:cut]])[0].ids)
            if tokens <= self._room:
                return cut
            fits -= tokens - self._room
        return 0

    def _refuse_too_long(self, texts: Sequence[str], encodings: Sequence[Encoding], pointer: Pointer) -> None:
        errors: list[dict[str, object]] = []
        for index, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            count = self._count(text, encoding)
            if count.excess:
                message = (
                    f"{label(pointer(index))} is {count.tokens} tokens; the limit is {count.limit} "
                    f"({self.num_special_tokens} of them special tokens): {count.excess} too many."
                )
                errors.append({"index": index, **vars(count), "pointer": pointer(index), "message": message})
        if errors:
            raise InputTooLong(" ".join(str(error["message"]) for error in errors), errors)

    def _finish(self, encoding: Encoding, overflow: str) -> EncodedText:
        source_tokens = len(encoding.ids) + self.num_special_tokens
        if source_tokens > self.limit:
            encoding.truncate(self._room, direction="left" if overflow == "truncate_head" else "right")
        return EncodedText(tuple(self._backend.post_process(encoding).ids), source_tokens)


def label(pointer: str) -> str:
    """`/inputs/0/data/3` as people write it: `inputs[0].data[3]`."""
    parts = pointer.split("/")[1:]
    return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in parts).removeprefix(".")


def check_unicode(texts: Sequence[str], pointer: Pointer = input_pointer) -> None:
    """Refuse texts with lone surrogates: they are halves of characters and have no tokens.

    Raises:
        InvalidRequest: names every such text.
    """
    _refuse(((i, "holds a lone surrogate") for i, text in enumerate(texts) if not _is_unicode(text)), pointer)


def clean_up(text: str) -> str:
    """The replacements of transformers' `clean_up_tokenization`, in its order."""
    for spaced, joined in (
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ):
        text = text.replace(spaced, joined)
    return text


def _read(path: Path) -> BackendTokenizer:
    if not path.is_file():
        raise ModelCorrupt(f"{path} is missing")
    try:
        return BackendTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelCorrupt(f"{path} cannot be read: {error}") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(found: Iterable[tuple[int, str]], pointer: Pointer) -> None:
    errors: list[dict[str, object]] = [
        {"index": index, "pointer": pointer(index), "message": f"{label(pointer(index))} {what}."}
        for index, what in found
    ]
    if errors:
        raise InvalidRequest(" ".join(str(error["message"]) for error in errors), errors)
