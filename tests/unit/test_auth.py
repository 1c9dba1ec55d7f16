"""Keys: read strictly, told by nobody; and no server open to strangers by accident."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.datastructures import Headers

from app.auth import ApiKeys, check_exposure, parse_rate, presented_key
from app.errors import InvalidSetting
from tests.service import read_settings

ONE, TWO = "k" * 16, "m" * 20


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nreports:{TWO}\n")
    keys = ApiKeys.from_settings(read_settings(api_keys=f"web:{ONE}", api_keys_file=file))
    assert (keys.name_of(ONE), keys.name_of(TWO), keys.name_of(""), keys.name_of(ONE[:-1])) == (
        "web",
        "reports",
        None,
        None,
    )
    assert not ApiKeys([])


def test_a_key_without_a_name_gets_one_and_a_key_may_hold_anything_but_a_colon() -> None:
    assert ApiKeys([ONE]).name_of(ONE) == "key-1"
    assert ApiKeys([f"a:{'é' * 16}"]).name_of("é" * 16) == "a"


@pytest.mark.parametrize("lines", [["a:short"], [f"a:{ONE}", f"a:{TWO}"], [f"a:{ONE}", f"b:{ONE}"]])
def test_wrong_keys_are_refused_without_showing_them(lines: list[str]) -> None:
    with pytest.raises(InvalidSetting) as caught:
        ApiKeys(lines)
    assert not any(line.rpartition(":")[2] in str(caught.value) for line in lines)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="nothing: FileNotFoundError"):
        ApiKeys.from_settings(read_settings(api_keys_file=tmp_path / "nothing"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(read_settings(host=host), ApiKeys([]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_another_address_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(InvalidSetting, match="PRECIS_ALLOW_ANONYMOUS=true"):
        check_exposure(read_settings(host=host), ApiKeys([]))
    check_exposure(read_settings(host=host), ApiKeys([ONE]))
    check_exposure(read_settings(host=host, allow_anonymous=True), ApiKeys([]))


def test_a_rate_that_is_none_is_named() -> None:
    assert parse_rate(None) is None
    with pytest.raises(InvalidSetting, match="PRECIS_RATE_LIMIT is 'often'"):
        parse_rate("often")


def test_either_header_shows_a_key() -> None:
    assert presented_key(Headers({"authorization": f"bearer  {ONE}"})) == ONE
    assert presented_key(Headers({"x-api-key": ONE})) == ONE
    assert presented_key(Headers({"authorization": f"Basic {ONE}"})) == ""
