"""From tokens that are certain to text that is: what streaming may send.

Knows that the text of a token may depend on the next ones. Does not know who decides which tokens are certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.errors import EngineFailed

# `tokenization.clean_up` is ten replacements of at most four characters, one after the other: each looks at most three
# characters back, so a character more than thirty from the end stays what it is.
CLEAN_UP_REACH = 30
# What a byte-level decoder writes for bytes that are not yet a character.
INCOMPLETE = "\ufffd"


class CertainText:
    """One summary on its way.

    Args:
        decode: token ids to text; the text of more tokens begins with that of fewer, but for what is held back.
        held_back: characters at the end that more tokens may change.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], held_back: int = 0) -> None:
        self._decode = decode
        self._held_back = held_back
        self._sent = ""

    def advance(self, token_ids: Sequence[int]) -> str:
        """What can be sent now that these tokens are certain; often nothing."""
        text = self._decode(token_ids).rstrip(INCOMPLETE)
        certain = text[: len(text) - self._held_back] if self._held_back < len(text) else ""
        if len(certain) <= len(self._sent):
            return ""
        return self._part(certain)

    def finish(self, text: str) -> str:
        """The rest of the whole summary.

        Raises:
            EngineFailed: what was sent is not its beginning.
        """
        return self._part(text)

    def _part(self, text: str) -> str:
        if not text.startswith(self._sent):
            raise EngineFailed("the text sent so far is not the beginning of the summary")
        part, self._sent = text[len(self._sent) :], text
        return part
