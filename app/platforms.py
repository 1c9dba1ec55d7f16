"""What SageMaker and Vertex AI say of the container they start, as settings.

Knows their variables and paths. Does not know what the settings do.

A platform's word on port and paths goes before PRECIS_*: it is the only caller, and it calls there. Its word on the
model is a default: PRECIS_MODEL goes before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.errors import ModelNotFound

SAGEMAKER_MODEL = Path("/opt/ml/model")
SAGEMAKER_PORT = "8080"
_VERTEX = {"AIP_HTTP_PORT": "port", "AIP_PREDICT_ROUTE": "predict_route", "AIP_HEALTH_ROUTE": "health_route"}


def platform_settings(
    environment: Mapping[str, str], serve: bool, sagemaker_model: Path = SAGEMAKER_MODEL
) -> dict[str, Any]:
    """Settings that a platform decides; none where there is no platform.

    Args:
        serve: whether the process was started as SageMaker starts it, with the argument `serve`.

    Raises:
        ModelNotFound: the model is in a store that this server does not read.
    """
    found: dict[str, Any] = {name: environment[key] for key, name in _VERTEX.items() if environment.get(key)}
    if serve or found:
        found["allow_anonymous"] = True  # the platform decides who may call, and sends no key
    if serve:
        found["port"] = environment.get("SAGEMAKER_BIND_TO_PORT") or SAGEMAKER_PORT
    if environment.get("PRECIS_MODEL"):
        return found
    if serve and (sagemaker_model / "config.json").is_file():
        found["model"] = str(sagemaker_model)
    if storage := environment.get("AIP_STORAGE_URI"):
        if "://" in storage:
            raise ModelNotFound(
                f"AIP_STORAGE_URI is {storage}, and this server does not read Cloud Storage: put the model into the "
                "image, and name it in PRECIS_MODEL"
            )
        found["model"] = storage
    return found
