"""Numbers and names that a summary states and its source does not hold: a proxy for faithfulness, by rule.

Knows digits, English number words and capitals. Does not know meaning: a flag is a reason to look, not an error, and a
text without a flag may still be wrong. What the rules do not see stands in `BLIND_SPOTS`, and goes into every report.

Numbers are compared by value: `1,000`, `1, 000` (as WordPiece writes it), `one thousand` and `1 thousand` are one.
Names are words that the sources and references mostly write with a capital where no sentence begins (truecasing by
majority, Lita et al. 2003, ACL), so they are found in lower-case output too; letters with digits behind them
(`person3`) are one always. An output with capitals may bring a name that those texts never have: a capital inside a
sentence is then a name as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from text_to_num import alpha2digit

from train.text_statistics import folded, words

BLIND_SPOTS = (
    "Numbers: English number words only. A count, a sum or a clock time put otherwise (`16:00` for `4 pm`, `noon`, "
    "`half past`, `a dozen`, `nineteen ninety`) is flagged though it may be right; `one` and `first` are never counted "
    "in a summary, for they are seldom numbers; a right number in the wrong place is not seen.",
    "Names: any word mostly written with a capital, so days, months and languages too; titles (`Mr`) are left out. A "
    "form that the source does not have is flagged (`Chinese` for `China`, `TV` for `television`); a name that is also "
    "a common word (`Will`, `Rose`) is not seen, nor is a known name given to the wrong person. In lower-case output a "
    "name that no source or reference of the data has is not seen.",
)

_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_SCALED = re.compile(rf"(?<![\w.,])(\d+(?:,\d{{3}})*(?:\.\d+)?) ({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
# A number that a letter stands before is part of a name (`Person1`, `B2`). WordPiece sets a space behind `,` and `.`.
_NUMBER = re.compile(r"(?<![^\W_])(?<!\d[.,])(?:\d{1,3}(?:, ?\d{3})+(?!\d)(?:\. ?\d+)?|\d+(?:\. ?\d+)?)")
_ONE = re.compile(r"(?<!\w)1(?!\d)")
_OCLOCK = re.compile(r"\bo ?['\u2019] ?clock\b", re.IGNORECASE)
_HYPHEN = re.compile(r"(?<=[^\W\d_]) ?- ?(?=[^\W\d_])")
_IDENTIFIER = re.compile(r"[^\W\d_]+\d+")
_TOKEN = re.compile(r"[^\W_]+")
# Behind these a full stop ends no sentence.
_TITLES = {"mr", "mrs", "ms", "dr", "prof", "st"}
_SENTENCE_START = re.compile(r"[.!?:\n\u2026]|[\"\u201c(\[*]\s*$")


@dataclass(frozen=True)
class Found:
    """What a summary states of one kind, and which of it the source does not hold; as it is written there."""

    stated: tuple[str, ...]
    unheld: tuple[str, ...]


def check_numbers(summary: str, source: str) -> Found:
    """The numbers of a summary; a number is held where the source has one of the same value."""
    held = {value for _, readings in _numbers(source, least=0) for reading in readings for value in reading}
    stated, unheld = [], []
    for shown, readings in _numbers(summary, least=1):
        if shown == "1" and not _ONE.search(summary):
            continue  # a word: `first, second and third` are read as a group
        stated.append(shown)
        if not any(held.issuperset(reading) for reading in readings):
            unheld.append(shown)
    return Found(tuple(stated), tuple(unheld))


class Names:
    """Which words are names, as learnt from the writing of the texts given."""

    def __init__(self, texts: Iterable[str]) -> None:
        capital: Counter[str] = Counter()
        small: Counter[str] = Counter()
        for text in texts:
            for token, starts in _tokens(text):
                if token[0].islower():
                    small[folded(token)] += 1
                elif token[0].isupper() and not starts:
                    capital[folded(token)] += 1
        self._names = {word for word, count in capital.items() if count > small[word] and _may_be_name(word)}
        self._small = set(small)

    def check(self, summary: str, source: str) -> Found:
        """The names of a summary; a name is held where the source has the same word, in whatever case."""
        cased = any(c.isupper() for c in summary)
        held = set(words(source))
        stated, unheld = [], []
        for token, starts in _tokens(summary):
            word = folded(token)
            unknown = cased and token[0].isupper() and not starts and _may_be_name(word) and word not in self._small
            if word in self._names or unknown or _IDENTIFIER.fullmatch(word):
                stated.append(token)
                if word not in held:
                    unheld.append(token)
        return Found(tuple(stated), tuple(unheld))


def _may_be_name(word: str) -> bool:
    """Not `I`, not the initial of `O'Neil`, not `Mr`."""
    return len(word) > 1 and word not in _TITLES


def _numbers(text: str, least: int) -> Iterator[tuple[str, list[set[float]]]]:
    """Each number as written in digits, and the ways to read it: as one value, or `10, 200` as two.

    Args:
        text: English.
        least: number words of this value and below that stand alone are left out.
    """
    text = _HYPHEN.sub("-", _OCLOCK.sub(" ", text))
    # Before the words become digits: `5 million` would be two numbers.
    text = _SCALED.sub(lambda m: f"{float(m[1].replace(',', '')) * _SCALES[m[2].lower()]:.10g}", text)
    text = alpha2digit(text, "en", threshold=least)
    for match in _NUMBER.finditer(text):
        shown = match[0]
        readings = [{float(shown.replace(",", "").replace(" ", ""))}]
        if " " in shown:
            readings.append({float(part) for part in re.findall(r"\d+", shown)})
        yield shown, readings


def _tokens(text: str) -> Iterator[tuple[str, bool]]:
    """Each word as written, and whether a sentence, a turn or a quotation begins with it."""
    end = 0
    before = ""
    for match in _TOKEN.finditer(text):
        between = text[end : match.start()]
        title = before in _TITLES and between.strip() in (".", "")
        yield match[0], (end == 0 or _SENTENCE_START.search(between) is not None) and not title
        before, end = match[0].lower(), match.end()
