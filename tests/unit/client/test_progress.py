"""Progress is a bar, a function of the caller's, or nothing; and never a reason to fail."""

from __future__ import annotations

import sys

import pytest

from app.client.progress import reporting


def test_the_callers_function_is_called() -> None:
    counts: list[int] = []
    with reporting(counts.append, 5) as advance:
        advance(2)
        advance(3)
    assert counts == [2, 3]


def test_a_bar_is_drawn_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(True, 5) as advance:
        advance(5)
    assert "5/5" in capsys.readouterr().err


def test_without_tqdm_a_line_in_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with reporting(True, 5) as advance:
        advance(5)
    assert "tqdm is not installed" in caplog.text


def test_nothing_is_shown_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(False, 5) as advance:
        advance(5)
    assert capsys.readouterr() == ("", "")
