"""Turns of dialogues, sentences of prose."""

from __future__ import annotations

import pytest

from train.units import joined, sentences, units

DIALOGUE = "#P1#: Hi. You?\n#P2#: Yes.\n\n#P1#: So."


def test_a_dialogue_has_turns_and_prose_has_sentences() -> None:
    assert units(DIALOGUE) == ["#P1#: Hi. You?", "#P2#: Yes.", "#P1#: So."]
    assert units("One is\nhere. Two! Three?") == ["One is here.", "Two!", "Three?"]


@pytest.mark.parametrize("document", [DIALOGUE, "One. Two! Three?", "no end"])
def test_all_units_joined_are_the_document_but_for_space(document: str) -> None:
    assert joined(document, units(document)).split() == document.split()


def test_a_line_ends_a_sentence() -> None:
    assert sentences("One. Two\nthree.\n\n") == ["One.", "Two", "three."]
    assert sentences("") == []
