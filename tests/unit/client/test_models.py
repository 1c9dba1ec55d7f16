"""The client's models and the server's schemas have the same keys."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from app import client, schemas


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (client.Summary, schemas.Summary),
        (client.Alternative, schemas.Alternative),
        (client.TokenCount, schemas.TokenCountItem),
        (client.Health, schemas.Health),
    ],
)
def test_the_keys_are_the_servers(ours: type[BaseModel], theirs: type[BaseModel]) -> None:
    assert set(ours.model_fields) == set(theirs.model_fields)


@pytest.mark.parametrize(("ours", "theirs"), [(client.Info, schemas.Info), (client.Limits, schemas.Limits)])
def test_what_the_client_needs_of_info_is_there(ours: type[BaseModel], theirs: type[BaseModel]) -> None:
    assert set(ours.model_fields) <= set(theirs.model_fields)


def test_keys_of_a_newer_server_are_kept() -> None:
    assert vars(client.Health.model_validate({"status": "ok", "since": 3}).model_copy())["status"] == "ok"
    assert client.Health.model_validate({"status": "ok", "since": 3}).model_extra == {"since": 3}
