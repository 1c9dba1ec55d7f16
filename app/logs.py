"""How a log line looks, text or JSON, and which request it belongs to; the message of an exception is left out.

Knows the fields of a line. Does not know what is worth logging. Libraries quote what they choke on in their exceptions,
and that may be a caller's text: of an exception only its type and its frames are written, unless it comes from where no
text ever is.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Literal

Format = Literal["text", "json"]

# The engine sees token ids and an exporter sees spans: neither has a text to quote.
TEXTLESS = ("app.engine", "opentelemetry")
# Fields of a record that are no part of a JSON line: uvicorn's message with colours in it.
_UNWANTED = ("color_message",)
_logger = logging.getLogger("app")
_request: ContextVar[tuple[str, str | None] | None] = ContextVar("request", default=None)


@contextmanager
def request_lines(request_id: str, trace_id: str | None) -> Iterator[None]:
    """Every line logged in this block, and in the tasks and threads begun in it, carries the ids of its request."""
    token = _request.set((request_id, trace_id))
    try:
        yield
    finally:
        _request.reset(token)


def configure(level: str, form: Format) -> None:
    """Send every logger's lines to standard error; as JSON, warnings and what nobody catches are lines as well.

    Args:
        level: "debug", "info", "warning" or "error".
    """
    handler = logging.StreamHandler()
    handler.addFilter(prepare)
    handler.setFormatter(json_formatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if form == "json":
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def prepare(record: logging.LogRecord) -> bool:
    """Give a record its request's ids, and replace its exception by what may be written of it; True, as a filter."""
    ids = _request.get()
    if ids is not None:
        record.request_id, trace_id = ids
        if trace_id is not None:
            record.trace_id = trace_id
    if record.exc_info and not record.name.startswith(TEXTLESS):
        _, error, _ = record.exc_info
        record.exc_info = None
        record.exc_text = frames(error) if error is not None else None
    return True


class TextFormatter(logging.Formatter):
    """For people: the ids of a request stand at the end of its lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its exception."""
        line = super().formatMessage(record)
        for name, value in (("id", "request_id"), ("trace", "trace_id")):
            if found := getattr(record, value, None):
                line += f" {name}={found}"
        return line


def json_formatter() -> logging.Formatter:
    """For machines: one object a line."""
    from pythonjsonlogger.core import RESERVED_ATTRS
    from pythonjsonlogger.json import JsonFormatter

    names = {"levelname": "level", "name": "logger", "exc_info": "exception", "stack_info": "stack"}
    return JsonFormatter(
        ["levelname", "name", "message"],
        timestamp="time",
        rename_fields=names,
        reserved_attrs=[*RESERVED_ATTRS, *_UNWANTED],
    )


def frames(error: BaseException) -> str:
    """Where an exception and those behind it were raised, innermost cause first, each with its type only."""
    causes: list[str] = []
    at: BaseException | None = error
    while at is not None:
        causes.append("".join(traceback.format_tb(at.__traceback__)) + type(at).__qualname__)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return "\n".join(reversed(causes))


def _log_uncaught(kind: type[BaseException], error: BaseException | None, _: TracebackType | None) -> None:
    _logger.critical("uncaught %s", kind.__name__, exc_info=error)
