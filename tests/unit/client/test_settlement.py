"""A batch comes to an answer for each text, and no text is asked again once it is answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.client.batches import Batch, encode
from app.client.errors import (
    BadReply,
    BatchTooLarge,
    BodyTimeout,
    ClientError,
    EngineFailed,
    InputTooLong,
    InvalidRequest,
    NoReply,
    Unauthorized,
)
from app.client.settlement import settle

pytestmark = pytest.mark.anyio

TEXTS = encode([f"text {i}" for i in range(100, 110)])


class Server:
    """Refuses, by index, what it is told to; counts what it answers."""

    def __init__(self, too_long: set[int] = frozenset(), failing: set[int] = frozenset(), most: int = 100) -> None:  # type: ignore[assignment]
        self.too_long, self.failing, self.most = too_long, failing, most
        self.answered: Counter[int] = Counter()

    async def __call__(self, part: Batch) -> list[str]:
        if len(part) > self.most:
            raise BatchTooLarge("too many", status=413)
        bad = [at for at, text in enumerate(part) if text.index in self.too_long]
        if bad:
            raise InputTooLong("too long", status=413, errors=[{"index": at, "message": f"inputs[{at}]"} for at in bad])
        if any(text.index in self.failing for text in part):
            raise EngineFailed("failed", status=500)
        self.answered.update(text.index for text in part)
        return [f"summary {text.index}" for text in part]


@given(
    st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.integers(1, 12), st.integers(0, 9), st.integers(0, 10)
)
async def test_bad_texts_come_back_as_errors_in_their_places_and_the_others_answered_once(
    too_long: set[int], failing: set[int], most: int, start: int, count: int
) -> None:
    server = Server(too_long, failing, most)
    batch = TEXTS[start : start + count]
    answers = await settle(batch, server, return_errors=True)
    assert sorted(answers) == [text.index for text in batch]
    for index, answer in answers.items():
        if index in too_long:
            assert isinstance(answer, InputTooLong)
            assert (answer.indices, str(answer)) == ((index,), f"inputs[{index}]")
        elif index in failing:
            assert isinstance(answer, EngineFailed)
            assert answer.indices == (index,)
        else:
            assert answer == f"summary {index}"
    good = {text.index for text in batch} - too_long - failing
    assert server.answered == Counter(dict.fromkeys(good, 1))


async def test_without_return_errors_the_error_names_the_callers_texts() -> None:
    with pytest.raises(InputTooLong) as caught:
        await settle(TEXTS[4:], Server(too_long={6, 8}), return_errors=False)
    assert caught.value.indices == (6, 8)


async def test_a_batch_over_the_limit_is_halved_though_errors_are_raised() -> None:
    server = Server(most=3)
    assert len(await settle(TEXTS, server, return_errors=False)) == 10
    assert set(server.answered.values()) == {1}


async def test_one_text_that_is_too_large_by_itself_is_an_error() -> None:
    with pytest.raises(BatchTooLarge):
        await settle(TEXTS[:1], Server(most=0), return_errors=False)
    answers = await settle(TEXTS[:2], Server(most=0), return_errors=True)
    assert [(type(answers[i]), answers[i].indices) for i in (0, 1)] == [  # type: ignore[union-attr]
        (BatchTooLarge, (0,)),
        (BatchTooLarge, (1,)),
    ]


def failing_with(error: Callable[[], ClientError]) -> Callable[[Batch], object]:
    async def ask(part: Batch) -> list[str]:
        raise error()

    return ask


@pytest.mark.parametrize(
    "error",
    [
        lambda: Unauthorized("no key", status=401),
        lambda: InvalidRequest("num_beams", status=422, errors=[{"pointer": "/parameters/num_beams"}]),
        lambda: BadReply("HTML", status=200),
    ],
)
async def test_an_error_of_the_whole_call_is_raised_whatever_was_asked(error: Callable[[], ClientError]) -> None:
    with pytest.raises(type(error())):
        await settle(TEXTS, failing_with(error), return_errors=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [lambda: NoReply("dropped"), lambda: BodyTimeout("slow", status=408)])
async def test_texts_without_an_answer_at_last_get_the_error_of_their_batch(error: Callable[[], ClientError]) -> None:
    answers = await settle(TEXTS, failing_with(error), return_errors=True)  # type: ignore[arg-type]
    assert [answers[i].indices for i in range(10)] == [(i,) for i in range(10)]


async def test_a_number_that_is_not_of_the_batch_ends_in_an_error_not_in_a_loop() -> None:
    def error() -> ClientError:
        return InputTooLong("m", status=413, errors=[{"index": 99}])

    with pytest.raises(InputTooLong):
        await settle(TEXTS, failing_with(error), return_errors=True)  # type: ignore[arg-type]
