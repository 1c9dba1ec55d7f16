"""Protocols that name the model in the path: one model is served here, under one name and one version.

Knows what it is called. Does not know what a caller wants of it.
"""

from __future__ import annotations

from fastapi import Request, Response

from app.errors import NotReady, UnknownModel
from app.model_registry import ModelEntry
from app.routes.request import runtime_of
from app.schemas_platforms import ModelReady


def name_of(entry: ModelEntry) -> str:
    """A hub model `owner/name` goes by `name`: a slash would end the path's segment."""
    return entry.name.rpartition("/")[2]


def served_entry(request: Request) -> ModelEntry:
    """What is served.

    Raises:
        NotReady: nothing yet.
    """
    model = runtime_of(request).model
    if model is None:
        raise NotReady("The model is not ready.")
    return model.entry


def require_served(request: Request, name: str, version: str | None = None) -> ModelEntry:
    """What is served, if it is what the path names; no version means the one there is.

    Raises:
        UnknownModel: another name or version.
        NotReady: nothing yet.
    """
    entry = served_entry(request)
    if name != name_of(entry):
        raise UnknownModel(f"There is no model {name[:100]!r} here; this server has {name_of(entry)!r}.")
    if version not in (None, entry.version):
        raise UnknownModel(f"There is no version {version[:100]!r} of {name!r} here; it is {entry.version!r}.")
    return entry


def model_ready(request: Request, response: Response, name: str, version: str | None = None) -> ModelReady:
    """Whether requests for the model should come here; with 503 where they should not.

    Raises:
        UnknownModel: another name or version.
        NotReady: nothing yet.
    """
    require_served(request, name, version)
    ready = runtime_of(request).status() == "ok"
    response.status_code = 200 if ready else 503
    return ModelReady(name=name, ready=ready)
