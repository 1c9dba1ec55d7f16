"""What routes share: reading a JSON body strictly, and giving up work whose caller has left.

Knows ASGI's receive. Does not know what is in the body.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from app.errors import BodyTimeout, InvalidRequest, MalformedJSON, NotAcceptable, UnsupportedMedia
from app.runtime import Runtime
from app.schemas import TAGS, SummarizeRequest, TokenizeRequest
from app.tokenization import Pointer

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

MAX_ERRORS = 50  # of one reply
_REFUSED = ("q=0", "q=0.0", "q=0.00", "q=0.000")
_ACCEPTED = frozenset({"", "*/*", "application/*", "application/json", "text/*", "text/event-stream"})


def runtime_of(request: Request) -> Runtime:
    """The application's running parts."""
    runtime = request.app.state.runtime
    assert isinstance(runtime, Runtime)
    return runtime


async def read_json(request: Request) -> Any:
    """The body, if it is declared and written as JSON.

    Raises:
        NotAcceptable: see `check_accept`.
        UnsupportedMedia: another Content-Type, or a compressed body.
        MalformedJSON: see `decode_json`.
        BodyTimeout: it did not arrive in time.
    """
    check_accept(request)
    check_media(request)
    return decode_json(await read_body(request))


def check_accept(request: Request) -> None:
    """Let a request pass whose Accept header leaves JSON or server-sent events; one without the header does.

    Raises:
        NotAcceptable: it names other types only.
    """
    if _ACCEPTED.isdisjoint(accepted_media(request)):
        raise NotAcceptable("The reply is application/json, or text/event-stream; Accept names neither.")


def accepted_media(request: Request) -> list[str]:
    """The media types of the Accept headers, in lower case, without those that they refuse by q=0; */* if none."""
    accepted = []
    for part in ",".join(request.headers.getlist("accept") or ["*/*"]).split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if not any(parameter.replace(" ", "") in _REFUSED for parameter in parameters):
            accepted.append(media)
    return accepted


def check_media(request: Request, *others: str) -> None:
    """Let a body pass that is declared as JSON, as one of `others`, or not at all.

    Raises:
        UnsupportedMedia: another Content-Type.
    """
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    json_like = media == "application/json" or (media.startswith("application/") and media.endswith("+json"))
    if not json_like and media not in others:
        raise UnsupportedMedia("The body must be JSON: send Content-Type: application/json.")


async def read_body(request: Request) -> bytes:
    """The body as it is.

    Raises:
        UnsupportedMedia: it is compressed.
        BodyTimeout: it did not arrive in time.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMedia("The body must not be compressed: send it without Content-Encoding.")
    timeout = runtime_of(request).settings.body_timeout
    try:
        async with asyncio.timeout(timeout):
            return await request.body()
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {timeout:g} s.") from None


def decode_json(body: bytes) -> Any:
    """What the bytes say.

    Raises:
        MalformedJSON: not UTF-8, not JSON, NaN or Infinity, or nested too deep to read.
    """
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: {error.msg} at character {error.pos}."
    except UnicodeDecodeError as error:
        message = f"The body is not UTF-8: byte {error.start}."
    except RecursionError:
        message = "The body is nested too deep."
    except ValueError as error:  # NaN, or an integer of thousands of digits
        message = f"The body is not JSON: {str(error)[:100]}."
    raise MalformedJSON(message, [{"pointer": "", "message": message}])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def parse(model: type[M], value: Any) -> M:
    """The body as a request.

    Raises:
        InvalidRequest: with a JSON pointer to each wrong place, and without what stands there: that is the caller's.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:MAX_ERRORS]
    errors: list[dict[str, object]] = [
        {"pointer": json_pointer(entry["loc"]), "message": entry["msg"], "type": entry["type"]} for entry in found
    ]
    raise InvalidRequest(" ".join(f"{entry['pointer'] or 'body'}: {entry['message']}." for entry in errors), errors)


def json_pointer(location: Iterable[str | int]) -> str:
    """RFC 6901; the tags of unions are no part of the body."""
    parts = (str(part) for part in location if part not in TAGS)
    return "".join("/" + part[:100].replace("~", "~0").replace("/", "~1") for part in parts)


def texts_of(body: SummarizeRequest | TokenizeRequest) -> tuple[list[str], Pointer]:
    """The texts, and where each of them stands in the body.

    Raises:
        InvalidRequest: none, or both spellings.
    """
    if (body.inputs is None) == (body.text is None):
        message = "inputs is missing" if body.inputs is None else "inputs and text are the same thing; give one of them"
        pointer = "/inputs" if body.inputs is None else "/text"
        raise InvalidRequest(f"{message}.", [{"pointer": pointer, "message": f"{message}."}])
    name = "inputs" if body.inputs is not None else "text"
    value = body.inputs if body.inputs is not None else body.text
    if isinstance(value, str):
        return [value], lambda index: f"/{name}"
    return list(value or ()), lambda index: f"/{name}/{index}"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the caller leaves. Call it after the body was read.

    Raises:
        ClientDisconnect: the caller left.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            runtime_of(request).metrics.disconnects.inc()
            raise ClientDisconnect
        return task.result()
    finally:
        left.cancel()
        task.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
