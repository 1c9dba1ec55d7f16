"""Texts and options in, summaries out: encode, admit, submit, await, decode.

Knows the checkpoint's defaults, the server's limits and how full it is. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from app.engine import EngineStats, GenerationParams, Hypothesis, SequenceOutput
from app.errors import BatchTooLarge, InvalidRequest, QueueFull
from app.metrics import Metrics
from app.schemas import Alternative, GenerateParameters, Parameters, Summary, TokenCountItem
from app.tokenization import EncodedText, Pointer, Tokenizer


class EngineSeam(Protocol):
    """The part of `AsyncEngine` that the service uses."""

    def start(self) -> None: ...  # noqa: D102
    @property
    def ready(self) -> bool: ...  # noqa: D102
    @property
    def alive(self) -> bool: ...  # noqa: D102
    async def submit(self, source_ids: Sequence[int], params: GenerationParams) -> SequenceOutput: ...  # noqa: D102
    def heartbeat_age(self) -> float: ...  # noqa: D102
    def stats(self) -> EngineStats: ...  # noqa: D102
    async def stop(self, timeout: float) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for, whatever the load."""

    max_batch_size: int
    max_num_beams: int
    max_output_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds, and the tokens encoded; of several texts the longest wait and the longest inference."""

    tokenization: float
    queue: float
    inference: float
    tokens: int


@dataclass(frozen=True)
class Options:
    """A request's parameters after defaults, limits and old spellings."""

    params: GenerationParams
    overflow: str
    clean_up_spaces: bool | None
    with_tokens: bool
    with_alternatives: bool


class Admission:
    """Bounds the source tokens admitted and not finished, and measures how fast they finish."""

    WINDOW_SECONDS = 60.0

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._finished: deque[tuple[float, int]] = deque()
        self._busy_since = 0.0

    def admit(self, tokens: int) -> None:
        """Take room for `tokens`, to be given back by `finish`, in parts.

        Raises:
            BatchTooLarge: there would not be room if the queue were empty.
            QueueFull: there is no room now.
        """
        if tokens > self.max_tokens:
            raise BatchTooLarge(f"The texts have {tokens} source tokens in all; the limit is {self.max_tokens}.")
        if self.tokens + tokens > self.max_tokens:
            retry_after = self.retry_after(tokens)
            raise QueueFull(f"The queue is full; try again in {retry_after} s.", retry_after)
        if self.tokens == 0:
            self._busy_since = time.monotonic()
        self.tokens += tokens

    def finish(self, tokens: int, served: bool) -> None:
        """Give room back; `served` says whether work was done for it."""
        self.tokens -= tokens
        if served:
            self._finished.append((time.monotonic(), tokens))
            self._forget_old()

    def retry_after(self, tokens: int) -> int:
        """Whole seconds until there is room for `tokens`, at the rate at which the last minute's texts finished."""
        now = time.monotonic()
        self._forget_old()
        since = max(self._busy_since, now - self.WINDOW_SECONDS)
        done = sum(count for at, count in self._finished if at >= since)
        elapsed = now - since
        if not done:  # nothing finished yet: it takes at least as long again
            return min(600, max(1, math.ceil(elapsed)))
        missing = self.tokens + tokens - self.max_tokens
        return min(600, max(1, math.ceil(missing * elapsed / done)))

    def _forget_old(self) -> None:
        oldest = time.monotonic() - self.WINDOW_SECONDS
        while self._finished and self._finished[0][0] < oldest:
            self._finished.popleft()


@dataclass
class Summarizer:
    """The service behind the routes."""

    tokenizer: Tokenizer
    engine: EngineSeam
    defaults: GenerationParams
    limits: RequestLimits
    admission: Admission
    metrics: Metrics
    default_overflow: str = "error"

    def __post_init__(self) -> None:
        self.metrics.admitted_tokens.set_function(lambda: self.admission.tokens)

    def options(self, parameters: Parameters | None) -> Options:
        """Resolve a request's parameters.

        Raises:
            InvalidRequest: they contradict each other or exceed a limit; names the option, its value and the limit.
        """
        parameters = parameters or Parameters()
        returned = parameters.return_ or []
        params = generation_params(parameters, self.defaults, self.limits)
        return Options(
            params=params,
            overflow=overflow_policy(parameters, self.default_overflow),
            clean_up_spaces=parameters.clean_up_tokenization_spaces,
            with_tokens="tokens" in returned,
            with_alternatives="alternatives" in returned or params.num_return_sequences > 1,
        )

    async def summarize(
        self, texts: Sequence[str], options: Options, pointer: Pointer
    ) -> tuple[list[Summary], Timings]:
        """One summary a text, in order. Cancelling it aborts every text that is not done.

        Raises:
            RequestError: a text or the batch cannot be accepted; nothing was computed.
            QueueFull: no room now.
            EngineError: a text failed; the others of the request are aborted.
        """
        started = time.perf_counter()
        self._check_batch(texts, pointer)
        encoded = await asyncio.to_thread(self.tokenizer.encode, texts, options.overflow, pointer)
        tokenization = time.perf_counter() - started
        outputs = await self._decode_all(encoded, options.params)
        summaries = [self._summary(*pair, options) for pair in zip(encoded, outputs, strict=True)]
        self._count(summaries, outputs)
        timings = Timings(
            tokenization=tokenization,
            queue=max(output.queue_seconds for output in outputs),
            inference=max(output.encode_seconds + output.decode_seconds for output in outputs),
            tokens=sum(len(text.ids) for text in encoded),
        )
        return summaries, timings

    async def count_tokens(self, texts: Sequence[str], pointer: Pointer) -> list[TokenCountItem]:
        """Hold each text against the token limit."""
        self._check_batch(texts, pointer)
        counts = await asyncio.to_thread(self.tokenizer.count, texts, pointer)
        return [TokenCountItem(**vars(count)) for count in counts]

    def _check_batch(self, texts: Sequence[str], pointer: Pointer) -> None:
        if len(texts) > self.limits.max_batch_size:
            message = f"The request has {len(texts)} texts; the limit is {self.limits.max_batch_size}."
            where = pointer(0).rpartition("/")[0]
            raise BatchTooLarge(message, [{"pointer": where, "message": message}])

    async def _decode_all(self, encoded: Sequence[EncodedText], params: GenerationParams) -> list[SequenceOutput]:
        tokens = [len(text.ids) for text in encoded]
        self.admission.admit(sum(tokens))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.engine.submit(text.ids, params)) for text in encoded]
                for task, count in zip(tasks, tokens, strict=True):
                    task.add_done_callback(partial(self._release, count))
        except ExceptionGroup as failures:
            raise _first(failures) from None
        return [task.result() for task in tasks]

    def _release(self, tokens: int, done: asyncio.Task[SequenceOutput]) -> None:
        self.admission.finish(tokens, served=not done.cancelled() and done.exception() is None)

    def _summary(self, text: EncodedText, output: SequenceOutput, options: Options) -> Summary:
        hypotheses = [self._alternative(hypothesis, options) for hypothesis in output.hypotheses]
        return Summary(
            **vars(hypotheses[0]),
            input_tokens=len(text.ids),
            source_tokens=text.source_tokens,
            truncated=text.truncated,
            alternatives=hypotheses if options.with_alternatives else None,
        )

    def _alternative(self, hypothesis: Hypothesis, options: Options) -> Alternative:
        return Alternative(
            summary_text=self.tokenizer.decode(hypothesis.token_ids, options.clean_up_spaces),
            score=hypothesis.score,
            finish_reason=hypothesis.finish_reason,
            output_tokens=len(hypothesis.token_ids),
            token_ids=list(hypothesis.token_ids) if options.with_tokens else None,
        )

    def _count(self, summaries: Sequence[Summary], outputs: Sequence[SequenceOutput]) -> None:
        for summary, output in zip(summaries, outputs, strict=True):
            self.metrics.texts.inc()
            self.metrics.texts_truncated.inc(summary.truncated)
            self.metrics.source_tokens.inc(summary.input_tokens)
            self.metrics.output_tokens.inc(summary.output_tokens)
            self.metrics.queue_duration.observe(output.queue_seconds)
            self.metrics.inference_duration.observe(output.encode_seconds + output.decode_seconds)


def generation_params(parameters: Parameters, defaults: GenerationParams, limits: RequestLimits) -> GenerationParams:
    """The checkpoint's options with the request's laid over them.

    Raises:
        InvalidRequest: the request says two things at once, or exceeds a limit.
    """
    given = _given_options(parameters)
    longest = _length(given, "max_length", "max_new_tokens")
    shortest = _length(given, "min_length", "min_new_tokens")
    where = {name: place for name, (_, place) in given.items()}
    for name, value, limit, setting in (
        ("num_beams", given.get("num_beams", (0, ""))[0], limits.max_num_beams, "PRECIS_MAX_NUM_BEAMS"),
        ("max_new_tokens", longest or 0, limits.max_output_tokens, "PRECIS_MAX_OUTPUT_TOKENS"),
        ("min_new_tokens", shortest or 0, limits.max_output_tokens, "PRECIS_MAX_OUTPUT_TOKENS"),
    ):
        if value > limit:
            place = where.get(name) or where[name.replace("_new_tokens", "_length")]
            raise _invalid(place, f"{name} is {value}; the limit is {limit} ({setting}).")
    if longest is not None and shortest is not None and shortest > longest:
        raise _invalid(
            where.get("min_new_tokens") or where["min_length"],
            f"min_new_tokens is {shortest}, more than max_new_tokens, which is {longest}.",
        )
    options = {name: value for name, (value, _) in given.items() if not name.startswith(("max_", "min_"))}
    num_beams = options.get("num_beams", defaults.num_beams)
    returns = options.get("num_return_sequences", min(defaults.num_return_sequences, num_beams))
    if returns > num_beams:
        raise _invalid(
            where["num_return_sequences"],
            f"num_return_sequences is {returns}, more than num_beams, which is {num_beams}.",
        )
    max_new_tokens = defaults.max_new_tokens if longest is None else longest
    min_new_tokens = defaults.min_new_tokens if shortest is None else shortest
    return replace(
        defaults,
        **{
            **options,
            "num_return_sequences": returns,
            "max_new_tokens": max_new_tokens,
            # The checkpoint's own minimum may be above the request's maximum; no end token before it, either way.
            "min_new_tokens": min(min_new_tokens, max_new_tokens),
        },
    )


def overflow_policy(parameters: Parameters, default: str) -> str:
    """What happens to texts over the limit: "error", "truncate_tail" or "truncate_head".

    Raises:
        InvalidRequest: `truncation` and `overflow` are at odds, or long documents were asked for.
    """
    from_truncation = None
    if parameters.truncation is not None:
        from_truncation = "truncate_tail" if parameters.truncation in ("longest_first", "only_first") else "error"
    if parameters.overflow == "chunk":
        raise _invalid("/parameters/overflow", "overflow 'chunk' is not built yet: cut long documents before sending.")
    if None not in (from_truncation, parameters.overflow) and from_truncation != parameters.overflow:
        raise _invalid(
            "/parameters/overflow",
            f"truncation {parameters.truncation!r} and overflow {parameters.overflow!r} are at odds; give one of them.",
        )
    return parameters.overflow or from_truncation or default


def default_params(generation_config: dict[str, Any], limits: RequestLimits) -> GenerationParams:
    """The checkpoint's options, within the server's limits.

    Raises:
        ValueError: they are out of range.
    """
    params = GenerationParams.from_generation_config(generation_config)
    num_beams = min(params.num_beams, limits.max_num_beams)
    max_new_tokens = min(params.max_new_tokens, limits.max_output_tokens)
    return replace(
        params,
        num_beams=num_beams,
        num_return_sequences=min(params.num_return_sequences, num_beams),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(params.min_new_tokens, max_new_tokens),
    )


def _given_options(parameters: Parameters) -> dict[str, tuple[Any, str]]:
    """Value and JSON pointer of each decode option of the request, from both places where it may stand."""
    given: dict[str, tuple[Any, str]] = {}
    for source, place in (
        (parameters.generate_parameters, "/parameters/generate_parameters"),
        (parameters, "/parameters"),
    ):
        for name in GenerateParameters.model_fields:
            value = getattr(source, name, None)
            if value is None:
                continue
            if name in given and given[name][0] != value:
                raise _invalid(f"{place}/{name}", f"{name} is given twice: {given[name][0]!r} and {value!r}.")
            given.setdefault(name, (value, f"{place}/{name}"))
    return given


def _length(given: dict[str, tuple[Any, str]], with_start: str, new: str) -> int | None:
    """The bound in generated tokens; None if the request has neither form."""
    if with_start not in given:
        return int(given[new][0]) if new in given else None
    value = max(0, int(given[with_start][0]) - 1)
    if new in given and given[new][0] != value:
        raise _invalid(
            given[new][1],
            f"{with_start} {given[with_start][0]} is {new} {value}, and {new} is {given[new][0]}; give one of them.",
        )
    return value


def _invalid(pointer: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, [{"pointer": pointer, "message": message}])


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
