"""Log lines: the ids of the request they belong to, one object a line, and never the message of a foreign exception."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app import logs

SECRET = "Anna's diagnosis"


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging as it was, after a test that configured it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # `configure` closes what it finds
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    yield
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


@pytest.fixture
def lines(restored: None, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was written to standard error since the last call."""
    return lambda: capsys.readouterr().err


def records(written: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.splitlines()]


def fail(message: str) -> None:
    raise ValueError(message)


def log_failure(logger: logging.Logger) -> None:
    try:
        try:
            fail(f"cannot read {SECRET}")
        except ValueError as error:
            raise RuntimeError(f"no summary of {SECRET}") from error
    except RuntimeError:
        logger.exception("it failed")


def test_a_json_line_has_the_standard_fields_and_those_of_its_request(lines: Callable[[], str]) -> None:
    logs.configure("info", "json")
    with logs.request_lines("abc", "0af7651916cd43dd8448eb211c80319c"):
        logging.getLogger("app.access").info("%s %s", "POST", 'a "quoted"\nline', extra={"status": 200})
    logging.getLogger("uvicorn.error").warning("plain", extra={"color_message": "\x1b[1mplain"})
    logging.getLogger("app").debug("not logged")
    first, second = records(lines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "app.access",
        "message": 'POST a "quoted"\nline',
        "status": 200,
        "request_id": "abc",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    assert set(second) == {"time", "level", "logger", "message"}


def test_a_text_line_ends_with_the_ids_of_its_request(lines: Callable[[], str]) -> None:
    logs.configure("info", "text")
    with logs.request_lines("abc", None):
        logging.getLogger("app").info("one")
        with logs.request_lines("abc", "0af7"):
            logging.getLogger("app").info("two")
    logging.getLogger("app").info("three")
    one, two, three = lines().splitlines()
    assert one.endswith(" INFO app: one id=abc")
    assert two.endswith(" INFO app: two id=abc trace=0af7")
    assert three.endswith(" INFO app: three")


@pytest.mark.parametrize("form", ["text", "json"])
def test_of_a_foreign_exception_only_types_and_frames_are_written(lines: Callable[[], str], form: logs.Format) -> None:
    logs.configure("info", form)
    log_failure(logging.getLogger("uvicorn.error"))
    written = lines()
    assert SECRET not in written
    told = records(written)[0]["exception"] if form == "json" else written
    assert told.index("in fail") < told.index("\nValueError\n")
    assert told.rstrip().endswith("\nRuntimeError")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_from_where_no_text_is_keeps_its_message(lines: Callable[[], str], form: logs.Format) -> None:
    logs.configure("info", form)
    log_failure(logging.getLogger("app.engine.engine"))
    assert f"RuntimeError: no summary of {SECRET}" in lines()


def test_tasks_and_threads_of_a_request_carry_its_ids_and_others_do_not(lines: Callable[[], str]) -> None:
    logs.configure("info", "json")

    def thread() -> None:
        logging.getLogger("app").info("thread")

    async def request(name: str) -> None:
        with logs.request_lines(name, None):
            await asyncio.create_task(asyncio.to_thread(thread))

    async def both() -> None:
        await asyncio.gather(request("a"), request("b"))
        await asyncio.to_thread(thread)

    asyncio.run(both())
    found = sorted(str(record.get("request_id")) for record in records(lines()) if record["message"] == "thread")
    assert found == ["None", "a", "b"]


def test_what_nobody_catches_and_warnings_are_json_lines(lines: Callable[[], str]) -> None:
    logs.configure("info", "json")
    thread = threading.Thread(target=fail, args=[SECRET])
    thread.start()
    thread.join()
    sys.excepthook(ValueError, ValueError(SECRET), None)
    logging.getLogger("py.warnings").warning("a warning")
    written = lines()
    found = records(written)
    assert [record["message"] for record in found] == ["uncaught ValueError", "uncaught ValueError", "a warning"]
    assert "in fail" in found[0]["exception"]
    assert SECRET not in written
