"""The Serve configuration files say nothing that Serve or the application does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from deploy.ray.application import Arguments

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def of_file() -> Any:
    return yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text(encoding="utf-8"))


def of_rayservice() -> Any:
    text = (DEPLOY / "kubernetes" / "rayservice" / "rayservice.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(yaml.safe_load(text)["spec"]["serveConfigV2"])


@pytest.mark.parametrize("read", [of_file, of_rayservice])
def test_serve_and_the_application_take_it(read: Any) -> None:
    schema = ServeDeploySchema.model_validate(read())
    (application,) = schema.applications
    arguments = Arguments.model_validate(application.args)
    assert arguments.model is not None
    assert arguments.max_replicas > arguments.min_replicas


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3, above max_replicas, which is 2"),
        ({"look_back_period_s": 1, "metrics_interval_s": 2}, "it must be above metrics_interval_s, which is 2"),
        ({"modle": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_reason(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Arguments(**arguments)


def test_words_of_a_command_line_are_read_as_numbers() -> None:
    found = Arguments.model_validate({"num_gpus": "1", "max_replicas": "8"})
    assert (found.num_gpus, found.max_replicas) == (1.0, 8)
