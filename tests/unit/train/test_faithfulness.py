"""Which numbers and names are flagged, which are not, and what the rules are known not to see."""

from __future__ import annotations

import pytest

from train.faithfulness import Names, check_numbers

SOURCE = (
    "#Person1#: Ms. Dawson, take twenty-five copies to Mr. Smith in Paris on Friday. It costs $1,500 or more.\n"
    "#Person2#: The file is from 2010. I will ask Bill's friends at O'Neil's caf\u00e9. One more, or three?"
)
OTHERS = ["Kate went with #Person1# and Rose. A rose is here; they rose.", "He met Kate and Jos\u00e9 in London."]


@pytest.mark.parametrize(
    "summary",
    [
        "25 copies",
        "twenty-five copies",
        "# person1 # takes twenty - five copies.",
        "It costs 1500.",
        "It costs 1, 500.",
        "one thousand five hundred dollars",
        "3 more",
        "the 3rd",
        "the third",
        "in 2010. 25 copies",
        "It costs $1500.00",
    ],
)
def test_a_number_is_held_however_it_is_written(summary: str) -> None:
    found = check_numbers(summary, SOURCE)
    assert found.stated
    assert not found.unheld


@pytest.mark.parametrize(
    ("summary", "unheld"),
    [
        ("26 copies", ("26",)),
        ("twenty-six copies and 25 more", ("26",)),
        ("It costs 15,000.", ("15,000",)),
        ("in 2011", ("2011",)),
        ("two people", ("2",)),
        ("five million", ("5000000",)),
        ("5 million", ("5000000",)),
    ],
)
def test_a_number_of_another_value_is_flagged(summary: str, unheld: tuple[str, ...]) -> None:
    assert check_numbers(summary, SOURCE).unheld == unheld


@pytest.mark.parametrize("summary", ["# person3 # at gate B2", "one of them", "the first", "no one"])
def test_names_with_digits_and_the_word_one_are_no_numbers(summary: str) -> None:
    assert check_numbers(summary, SOURCE).stated == ()


def test_a_group_of_ordinals_has_no_one_but_what_is_written_as_1_counts() -> None:
    assert check_numbers("first, second and third", SOURCE).stated == ("2", "3")
    assert check_numbers("1 copy", SOURCE).stated == ("1",)
    assert check_numbers("1 copy", SOURCE).unheld == ()  # "One more"
    assert check_numbers("at ten o ' clock", "at 10 o'clock").unheld == ()


def test_names_are_known_from_the_writing_of_the_data() -> None:
    names = Names([SOURCE, *OTHERS])
    found = names.check("ms. dawson and kate go to london with # person1 #.", SOURCE)
    assert found.stated == ("dawson", "kate", "london", "person1")  # a title is none
    assert found.unheld == ("kate", "london")
    # The same words with capitals, as another model would write them.
    assert names.check("Ms. Dawson and Kate go to London with #Person1#.", SOURCE).unheld == ("Kate", "London")


def test_a_capital_at_the_beginning_of_a_sentence_says_nothing() -> None:
    names = Names(["He went. Copies came. They saw: Files and \u201cThings\u201d.", "he said copies, files, things"])
    assert names.check("copies files things he they", "nothing").stated == ()
    # But behind a title the sentence has not ended.
    assert Names(["I know Dr. Jekyll."]).check("dr. jekyll", "nothing").unheld == ("jekyll",)


def test_possessives_accents_and_apostrophes_do_not_hide_a_name() -> None:
    names = Names([SOURCE, *OTHERS, "We saw Bill and O'Neil."])
    found = names.check("bill asks at o ' neil ' s. jose comes.", SOURCE)
    assert found.stated == ("bill", "neil", "jose")
    assert found.unheld == ("jose",)


def test_a_new_name_is_seen_in_cased_output_only() -> None:
    names = Names([SOURCE])
    assert names.check("Dawson meets Zoltan.", SOURCE).unheld == ("Zoltan",)
    assert names.check("dawson meets zoltan.", SOURCE).unheld == ()
    # A capital on a word that is known in lower case makes no name of it.
    assert names.check("Dawson takes Copies.", SOURCE).unheld == ()


def test_letters_with_digits_are_a_name_though_no_text_of_the_data_has_it() -> None:
    found = Names([SOURCE]).check("# person1 # meets # person3 # at 4pm.", SOURCE)
    assert found.stated == ("person1", "person3")
    assert found.unheld == ("person3",)


def test_a_name_that_is_mostly_a_common_word_is_not_seen() -> None:
    assert Names(OTHERS).check("rose came", SOURCE).stated == ()
