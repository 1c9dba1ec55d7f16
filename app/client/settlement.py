"""What becomes of a batch: summaries, or errors in the places of the texts that they speak of.

Knows which errors speak of a text and which of the call. Does not know HTTP, retries or time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from app.client.batches import Batch
from app.client.errors import (
    BadReply,
    BatchTooLarge,
    BodyTimeout,
    BodyTooLarge,
    ClientError,
    EngineFailed,
    RequestError,
    Unauthorized,
)

T = TypeVar("T")


async def settle(
    batch: Batch, ask: Callable[[Batch], Awaitable[Sequence[T]]], return_errors: bool
) -> dict[int, T | ClientError]:
    """One answer for each text, by its index. A text that was answered is never asked again.

    The server answers a batch whole or not at all. What it refuses as too large is asked again in halves, since its
    limits may be lower than they were. With `return_errors`, the texts that an error names are taken out and the
    others asked again; and where a text failed and the server cannot say which, halves find it.

    Raises:
        ClientError: without `return_errors`, the first that comes; with it, one that speaks of the call as a whole.
    """
    answers: dict[int, T | ClientError] = {}
    parts = [list(batch)]
    while parts:
        part = parts.pop()
        try:
            found = await ask(part)
        except ClientError as error:
            error.renumber([text.index for text in part])
            too_large = isinstance(error, (BatchTooLarge, BodyTooLarge))
            named = set(error.indices)
            if len(part) > 1 and (too_large or (return_errors and isinstance(error, EngineFailed))):
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            elif not return_errors or (not named and not too_large and _speaks_of_the_call(error)):
                raise
            else:
                named = named or {text.index for text in part}
                answers |= {index: error.about(index) for index in named}
                others = [text for text in part if text.index not in named]
                parts += [others] if others else []
        else:
            answers |= zip((text.index for text in part), found, strict=True)
    return answers


def _speaks_of_the_call(error: ClientError) -> bool:
    """Whether every other text would meet the same error."""
    return isinstance(error, (RequestError, Unauthorized, BadReply)) and not isinstance(error, BodyTimeout)
