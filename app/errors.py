"""Every error the service raises on purpose. Knows neither HTTP nor torch, and imports nothing.

    PrecisError
    ├── RequestError            the caller can mend it
    │   ├── MalformedJSON
    │   ├── UnsupportedMedia
    │   ├── NotAcceptable
    │   ├── InvalidRequest      schema, parameters, or a text that cannot be summarised
    │   ├── InputTooLong
    │   ├── BatchTooLarge
    │   ├── BodyTooLarge
    │   ├── UnknownModel
    │   └── BodyTimeout
    ├── InvalidSetting          the operator can mend it; at start
    ├── Unauthorized            no key, or none of ours
    ├── QueueFull               the caller can try again
    ├── RateLimited             the caller can try again
    ├── DeadlineExceeded        the caller's time, or the server's, is over
    ├── NotReady
    ├── ModelError              at start, before anything is served
    │   ├── ModelNotFound
    │   └── ModelCorrupt
    └── EngineError
        ├── EngineFailed        this sequence failed
        └── EngineStopped       the engine is gone or going

What HTTP makes of each stands in `exception_handlers.py`.
"""

from __future__ import annotations


class PrecisError(Exception):
    """Root of the tree. The message is meant for the caller: it never holds a text, a summary or a credential."""


class RequestError(PrecisError):
    """The request cannot be answered as it stands.

    Args:
        message: the whole story in one sentence.
        errors: one entry for each offending place; `message`, a JSON pointer `pointer`, and what else helps.
    """

    def __init__(self, message: str, errors: list[dict[str, object]] | None = None) -> None:
        super().__init__(message)
        self.errors = errors or []


class MalformedJSON(RequestError):
    """The body is not JSON (NaN and Infinity are not JSON either)."""


class UnsupportedMedia(RequestError):
    """The body is declared as something else than JSON."""


class NotAcceptable(RequestError):
    """The caller accepts neither JSON nor events."""


class InvalidRequest(RequestError):
    """The body is JSON but not a request; or its parameters contradict each other or a limit."""


class InputTooLong(RequestError):
    """At least one text has more tokens than the encoder has positions; `errors` names every one."""


class BatchTooLarge(RequestError):
    """More texts, or more tokens in all, than the server takes in one request."""


class BodyTooLarge(RequestError):
    """More bytes than the server reads."""


class UnknownModel(RequestError):
    """The path names a model, or a version of it, that is not served."""


class BodyTimeout(RequestError):
    """The body did not arrive in time."""


class InvalidSetting(PrecisError):
    """A setting that only the running process can judge is wrong."""


class Unauthorized(PrecisError):
    """The request shows no key, or none of ours."""


class RateLimited(PrecisError):
    """The caller's requests of this window are used up; `headers` say so to its client."""

    def __init__(self, message: str, retry_after: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.headers = headers or {}


class QueueFull(PrecisError):
    """No room for the request's texts now."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(PrecisError):
    """The result could not be there in time; nothing more is computed for it."""


class NotReady(PrecisError):
    """The model is not loaded, not warm, or no longer answering."""


class ModelError(PrecisError):
    """The model cannot be served."""


class ModelNotFound(ModelError):
    """Nothing in the store, on disk or on the hub goes by this name."""


class ModelCorrupt(ModelError):
    """A file of the model is missing, changed or not what its manifest says."""


class EngineError(PrecisError):
    """Something went wrong past the seam."""


class EngineFailed(EngineError):
    """The engine could not finish this sequence; others may be well."""


class EngineStopped(EngineError):
    """The engine takes no more work."""
