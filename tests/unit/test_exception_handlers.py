"""The table from error class to reply."""

from __future__ import annotations

import pytest

from app import errors
from app.exception_handlers import REPLIES, header_safe
from app.routes.request import json_pointer


def tree(root: type[Exception]) -> list[type[Exception]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


def test_every_error_that_can_meet_a_request_has_a_reply_of_its_own_kind() -> None:
    leaves = [kind for kind in tree(errors.PrecisError) if not kind.__subclasses__()]
    at_start = [*tree(errors.ModelError), errors.InvalidSetting]
    for kind in leaves:
        found = next(base for base in kind.__mro__ if base in REPLIES)
        assert (found is Exception) == (kind in at_start), kind


def test_the_docstring_draws_the_tree() -> None:
    drawn = errors.__doc__ or ""
    assert all(kind.__name__ in drawn for kind in tree(errors.PrecisError))


@pytest.mark.parametrize(
    ("text", "safe"),
    [("plain", "plain"), ("a\r\nSet-Cookie: x", "a?Set-Cookie: x"), ("ü\ud800", "?"), ("x" * 999, "x" * 512)],
)
def test_headers_hold_one_printable_line(text: str, safe: str) -> None:
    assert header_safe(text) == safe


def test_json_pointers() -> None:
    assert json_pointer(["inputs", "texts", 3]) == "/inputs/3"
    assert json_pointer(["a/b~c"]) == "/a~1b~0c"
    assert json_pointer([]) == ""
