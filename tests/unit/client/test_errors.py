"""Replies as errors: every kind that the server has, in the caller's numbering, and whatever proxies say."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import client
from app.client.errors import ClientError, from_reply
from app.errors import PrecisError
from app.exception_handlers import REPLIES

TOO_LONG = {
    "type": "/problems/input-too-long",
    "detail": "inputs[0] is 513 tokens. inputs[2] is 600 tokens.",
    "errors": [
        {"index": 0, "pointer": "/inputs/0", "excess": 1, "message": "inputs[0] is 513 tokens."},
        {"index": 2, "pointer": "/inputs/2", "excess": 88, "message": "inputs[2] is 600 tokens."},
    ],
}


def error_of(status: int, problem: dict[str, Any], **headers: str) -> ClientError:
    return from_reply(status, {name.replace("_", "-"): v for name, v in headers.items()}, json.dumps(problem))


@pytest.mark.parametrize(("kind", "reply"), REPLIES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_error_of_the_server_has_the_same_name_here_or_its_status_has_one(
    kind: type[Exception], reply: Any
) -> None:
    error = error_of(reply.status, {"type": f"/problems/{reply.slug}", "detail": "d"})
    same_name = getattr(client, kind.__name__, None)
    if same_name is not None and same_name is not client.RequestError:
        assert type(error) is same_name
    elif reply.status < 500:
        assert isinstance(error, (client.RequestError, client.RateLimited))
    else:
        assert isinstance(error, (client.InternalError, client.NotReady, client.DeadlineExceeded))


def test_the_client_has_a_name_for_every_error_that_the_server_sends_on_purpose() -> None:
    sent = {kind.__name__ for kind in REPLIES if issubclass(kind, PrecisError)}
    assert sent <= set(client.__all__)


@pytest.mark.parametrize(
    "kind", [kind for kind in REPLIES if issubclass(kind, PrecisError)], ids=lambda kind: kind.__name__
)
def test_names_stand_in_the_tree_as_the_servers_do(kind: type[PrecisError]) -> None:
    ours = [base.__name__ for base in getattr(client, kind.__name__).__mro__]
    theirs = [base.__name__ for base in kind.__mro__]
    assert [name.replace("ClientError", "PrecisError") for name in ours] == theirs


def test_what_the_reply_says_is_kept() -> None:
    error = error_of(429, {"type": "/problems/queue-full", "detail": "Full."}, retry_after="7", x_request_id="r-9")
    assert isinstance(error, client.QueueFull)
    assert (str(error), error.status, error.retry_after, error.request_id) == ("Full.", 429, 7, "r-9")


def test_texts_are_named_by_the_callers_numbers() -> None:
    error = error_of(413, TOO_LONG)
    error.renumber([40, 41, 42])
    assert error.indices == (40, 42)
    assert str(error) == "inputs[40] is 513 tokens. inputs[42] is 600 tokens."
    assert [entry["index"] for entry in error.errors] == [40, 42]
    assert [entry["pointer"] for entry in error.errors] == ["/inputs/40", "/inputs/42"]
    one = error.about(42)
    assert (type(one), str(one), one.indices, one.status) == (type(error), "inputs[42] is 600 tokens.", (42,), 413)
    assert one.errors == [error.errors[1]]


def test_a_text_is_known_by_its_pointer_where_the_server_gives_no_index() -> None:
    error = error_of(422, {"errors": [{"pointer": "/inputs/1", "message": "not Unicode"}]})
    error.renumber([7, 8])
    assert error.indices == (8,)


@pytest.mark.parametrize("pointer", ["/inputs", "/parameters/num_beams", "/inputs/5", "/inputs/x", ""])
def test_what_is_no_text_of_the_request_is_not_renumbered(pointer: str) -> None:
    error = error_of(422, {"errors": [{"pointer": pointer, "message": "m"}]})
    error.renumber([7, 8])
    assert error.indices == ()
    assert error.errors == [{"pointer": pointer, "message": "m"}]


@pytest.mark.parametrize("value", ["", "-1", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT", "²", "٣"])
def test_only_whole_seconds_are_a_retry_after(value: str) -> None:
    assert error_of(503, {}, retry_after=value).retry_after is None


def test_a_retry_after_of_thousands_of_digits_is_read_in_no_time() -> None:
    assert error_of(503, {}, retry_after="9" * 10_000).retry_after == 999_999_999


def test_the_error_of_a_stream_has_the_bodys_status() -> None:
    error = error_of(200, {"type": "/problems/generation-failed", "status": 500, "detail": "d"})
    assert (type(error), error.status) == (client.EngineFailed, 500)


def test_errors_survive_pickling() -> None:
    error = error_of(413, TOO_LONG)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.errors, copy.status) == (type(error), str(error), error.errors, 413)


@given(
    st.integers(300, 599),
    st.one_of(
        st.binary(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.sampled_from(["type", "detail", "errors", "status"]), inner)
            ),
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_any_reply_is_some_error(status: int, content: bytes) -> None:
    error = from_reply(status, {}, content)
    error.renumber([3])
    assert error.status == status
    assert str(error)
