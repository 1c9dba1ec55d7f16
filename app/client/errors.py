"""Every error that the client raises, named as the server's own (app/errors.py), and the way from a reply to one.

Knows status codes and RFC 9457 bodies. Does not know httpx, nor what is worth another try.

    ClientError
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
    ├── Unauthorized            no key, or not one of the server's
    ├── QueueFull               the caller can try again
    ├── RateLimited
    ├── NotReady
    ├── EngineError
    │   ├── EngineFailed        a text failed
    │   └── EngineStopped
    ├── InternalError           any other 5xx
    ├── DeadlineExceeded        the server's 504, or the call's own timeout
    ├── NoReply                 refused, dropped, or too slow
    └── BadReply                a reply that the contract does not know
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

_POINTER = re.compile(r"/inputs/(\d+)(?=/|$)")
_LABEL = re.compile(r"\binputs\[(\d+)\]")


class ClientError(Exception):
    """Root of the tree. The message never holds a text, a summary or a key.

    Attributes:
        status: of the reply; None if there was none.
        errors: each offending place as the server names it: `message`, `pointer`, and what else helps. `index` and
            whatever says `inputs[i]` count in the caller's texts, whatever batch a text was sent in.
        indices: the caller's texts that the error speaks of; empty if it speaks of the call as a whole.
        request_id: what the server's log calls the request.
        retry_after: seconds; when the server expects to have room.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        indices: Sequence[int] = (),
        request_id: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.errors = [dict(entry) for entry in errors]
        self.indices = tuple(indices)
        self.request_id = request_id
        self.retry_after = retry_after

    def about(self, index: int) -> Self:
        """The part that speaks of one of the caller's texts."""
        own = [entry for entry in self.errors if entry.get("index") == index]
        message = " ".join(str(entry["message"]) for entry in own if "message" in entry) or str(self)
        return type(self)(
            message,
            status=self.status,
            errors=own,
            indices=[index],
            request_id=self.request_id,
            retry_after=self.retry_after,
        )

    def renumber(self, callers: Sequence[int]) -> None:
        """Count in the caller's texts; `callers[i]` is the caller's number of the request's text i."""

        def number(found: re.Match[str]) -> str:
            at = int(found[1])
            return found[0].replace(found[1], str(callers[at])) if at < len(callers) else found[0]

        self.args = (_LABEL.sub(number, str(self)),)
        named = set()
        for entry in self.errors:
            at = _index(entry)
            if at is not None and at < len(callers):
                entry["index"] = callers[at]
                named.add(callers[at])
            if "pointer" in entry:
                entry["pointer"] = _POINTER.sub(number, str(entry["pointer"]), count=1)
            if "message" in entry:
                entry["message"] = _LABEL.sub(number, str(entry["message"]))
        self.indices = tuple(sorted(named))


class RequestError(ClientError):
    """The request cannot be answered as it stands."""


class MalformedJSON(RequestError):
    """The server could not read the body."""


class UnsupportedMedia(RequestError):
    """Something on the way changed the body's type."""


class NotAcceptable(RequestError):
    """Something on the way changed what the client accepts."""


class InvalidRequest(RequestError):
    """Options contradict each other or a limit, or a text cannot be summarised."""


class InputTooLong(RequestError):
    """Texts have more tokens than the encoder has positions; `errors` names them and where they would have to end."""


class BatchTooLarge(RequestError):
    """More texts, or more tokens in all, than the server takes in one request."""


class BodyTooLarge(RequestError):
    """More bytes than the server reads."""


class UnknownModel(RequestError):
    """The path names a model that is not served; no path of this client does, so something on the way changed it."""


class BodyTimeout(RequestError):
    """The body did not arrive in time."""


class Unauthorized(ClientError):
    """The API key is missing or wrong."""


class QueueFull(ClientError):
    """The server has no room now."""


class RateLimited(ClientError):
    """This caller has asked too often."""


class NotReady(ClientError):
    """The model is not loaded, not warm, or no longer answering."""


class EngineError(ClientError):
    """Something went wrong in the server's engine."""


class EngineFailed(EngineError):
    """A text of the request failed; the server does not say which."""


class EngineStopped(EngineError):
    """The engine takes no more work."""


class InternalError(ClientError):
    """The server, or something before it, failed in a way that has no name."""


class DeadlineExceeded(ClientError):
    """Time ran out: the server's (504), or the call's own `timeout` (no status)."""


class NoReply(ClientError):
    """No whole reply came: refused, dropped on the way, or later than `attempt_timeout`."""


class BadReply(ClientError):
    """A reply that is not what a Precis server answers: is it one?"""


_BY_SLUG: Mapping[str, type[ClientError]] = {
    "malformed-json": MalformedJSON,
    "unknown-model": UnknownModel,
    "not-acceptable": NotAcceptable,
    "body-timeout": BodyTimeout,
    "input-too-long": InputTooLong,
    "batch-too-large": BatchTooLarge,
    "body-too-large": BodyTooLarge,
    "unsupported-media-type": UnsupportedMedia,
    "unauthorized": Unauthorized,
    "invalid-request": InvalidRequest,
    "queue-full": QueueFull,
    "rate-limited": RateLimited,
    "deadline-exceeded": DeadlineExceeded,
    "not-ready": NotReady,
    "engine-stopped": EngineStopped,
    "generation-failed": EngineFailed,
}
# For what proxies answer, and for names that a newer server may have.
_BY_STATUS: Mapping[int, type[ClientError]] = {
    401: Unauthorized,
    403: Unauthorized,
    406: NotAcceptable,
    408: BodyTimeout,
    413: BodyTooLarge,
    415: UnsupportedMedia,
    422: InvalidRequest,
    429: RateLimited,
    503: NotReady,
    504: DeadlineExceeded,
}


def from_reply(status: int, headers: Mapping[str, str], content: bytes | str) -> ClientError:
    """The error that a reply stands for, whoever wrote it.

    Args:
        status: of the reply. A stream that fails has begun with 200; then the body's own status counts.
        headers: looked up in lower case.
    """
    problem = _problem(content)
    own = problem.get("status")
    status = own if status == 200 and isinstance(own, int) else status
    retry_after = headers.get("retry-after", "")
    errors = problem.get("errors")
    return _class_of(status, str(problem.get("type", "")))(
        str(problem.get("detail") or f"The server answered {status}."),
        status=status,
        errors=[entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else (),
        request_id=headers.get("x-request-id"),
        # Nine digits: a wait of thirty years, and no more work than that for int().
        retry_after=int(retry_after[:9]) if retry_after.isascii() and retry_after.isdecimal() else None,
    )


def _class_of(status: int, kind: str) -> type[ClientError]:
    family = RequestError if 400 <= status < 500 else InternalError if status >= 500 else BadReply
    return _BY_SLUG.get(kind.rpartition("/")[2]) or _BY_STATUS.get(status, family)


def _problem(content: bytes | str) -> dict[str, Any]:
    try:
        problem = json.loads(content)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _index(entry: Mapping[str, Any]) -> int | None:
    """The request's text that an entry speaks of; schema errors have a pointer only."""
    index = entry.get("index")
    if isinstance(index, int) and index >= 0:
        return index
    found = _POINTER.match(str(entry.get("pointer", "")))
    return int(found[1]) if found else None
