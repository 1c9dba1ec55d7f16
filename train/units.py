"""What a text is cut into: the turns of a dialogue, or the sentences of prose.

Knows two rules on characters. Does not know a language: sentences end at `.`, `!` or `?` before a space, so
abbreviations count as ends too.
"""

from __future__ import annotations

import re

# A turn of a dialogue: a short name, a colon, words.
_TURN = re.compile(r"[^:]{1,40}:\s?\S")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def units(document: str) -> list[str]:
    """The turns (lines) of a dialogue, or the sentences of prose, in order.

    A document is a dialogue when more than half of its lines, and at least two, begin like `Name: words`.
    """
    lines = _lines(document)
    return lines if _is_dialogue(lines) else _SENTENCE_END.split(" ".join(lines))


def joined(document: str, chosen: list[str]) -> str:
    """Some units of a document as one text: turns on lines of their own, sentences behind each other."""
    return ("\n" if _is_dialogue(_lines(document)) else " ").join(chosen)


def sentences(text: str) -> list[str]:
    """The sentences of a text; the end of a line ends one too."""
    return [part for line in _lines(text) for part in _SENTENCE_END.split(line)]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _is_dialogue(lines: list[str]) -> bool:
    turns = sum(_TURN.match(line) is not None for line in lines)
    return turns >= 2 and 2 * turns > len(lines)
