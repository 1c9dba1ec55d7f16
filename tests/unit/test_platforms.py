"""What SageMaker and Vertex AI say of their container becomes settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.errors import ModelNotFound
from app.platforms import platform_settings
from tests.service import read_settings

VERTEX = {"AIP_HTTP_PORT": "8081", "AIP_PREDICT_ROUTE": "/p", "AIP_HEALTH_ROUTE": "/h"}


def test_no_platform_decides_nothing() -> None:
    assert platform_settings({"PRECIS_PORT": "9", "AIP_STORAGE_URI": ""}, serve=False) == {}


def test_a_platforms_port_and_paths_go_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECIS_PORT", "9")
    settings = read_settings(**platform_settings(VERTEX, serve=False))
    assert (settings.port, settings.predict_route, settings.health_route) == (8081, "/p", "/h")
    assert read_settings(**platform_settings({}, serve=True)).port == 8080
    assert read_settings(**platform_settings({"SAGEMAKER_BIND_TO_PORT": "8083"}, serve=True)).port == 8083
    assert read_settings(**platform_settings({}, serve=False)).port == 9


def test_sagemakers_model_is_served_where_there_is_one_and_none_was_named(tmp_path: Path) -> None:
    assert "model" not in platform_settings({}, serve=True, sagemaker_model=tmp_path)
    (tmp_path / "config.json").touch()
    assert platform_settings({}, serve=True, sagemaker_model=tmp_path)["model"] == str(tmp_path)
    assert platform_settings({}, serve=False, sagemaker_model=tmp_path) == {}
    named = platform_settings({"PRECIS_MODEL": "mine"}, serve=True, sagemaker_model=tmp_path)
    assert "model" not in named


def test_vertex_models_come_from_folders_and_cloud_storage_is_refused_in_words() -> None:
    assert platform_settings({"AIP_STORAGE_URI": "/model"}, serve=False) == {"model": "/model"}
    assert platform_settings({"AIP_STORAGE_URI": "gs://b/m", "PRECIS_MODEL": "mine"}, serve=False) == {}
    with pytest.raises(ModelNotFound, match="does not read Cloud Storage"):
        platform_settings({"AIP_STORAGE_URI": "gs://b/m"}, serve=False)


@pytest.mark.parametrize("route", ["predict", "/{x}", ""])
def test_a_route_is_a_plain_path(route: str) -> None:
    with pytest.raises(ValidationError, match="predict_route"):
        read_settings(predict_route=route)
