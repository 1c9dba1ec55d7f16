"""Texts and options in, summaries out: encode, admit, submit, await, decode.

Knows the checkpoint's defaults, the server's limits and how full it is. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from app.admission import Admission
from app.certain_text import CLEAN_UP_REACH, CertainText
from app.engine import FORCED, EngineStats, GenerationParams, Hypothesis, Priority, SequenceOutput
from app.errors import BatchTooLarge, DeadlineExceeded, InvalidRequest
from app.metrics import Metrics
from app.schemas import Alternative, GenerateParameters, Parameters, Summary, TokenCountItem
from app.tokenization import EncodedText, Pointer, Tokenizer
from app.tracing import current

TOKEN_OPTIONS = (
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


class EngineSeam(Protocol):
    """The part of `AsyncEngine` that the service uses."""

    def start(self) -> None: ...  # noqa: D102
    @property
    def ready(self) -> bool: ...  # noqa: D102
    @property
    def alive(self) -> bool: ...  # noqa: D102
    async def submit(  # noqa: D102
        self,
        source_ids: Sequence[int],
        params: GenerationParams,
        *,
        priority: Priority,
        deadline: float,
        on_certain: Callable[[tuple[int, ...]], None] | None,
    ) -> SequenceOutput: ...
    def heartbeat_age(self) -> float: ...  # noqa: D102
    def stats(self) -> EngineStats: ...  # noqa: D102
    async def stop(self, timeout: float) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for, whatever the load.

    Attributes:
        vocab_size, one_vocabulary: the checkpoint's, see `ModelInfo`; the rest is the operator's.
    """

    max_batch_size: int
    max_num_beams: int
    max_output_tokens: int
    vocab_size: int
    one_vocabulary: bool = True


@dataclass(frozen=True)
class Timings:
    """Seconds, and the tokens encoded; of several texts the longest wait and the longest inference."""

    tokenization: float
    queue: float
    inference: float
    tokens: int


@dataclass(frozen=True)
class Terms:
    """What a caller asks of the service, not of the model.

    Attributes:
        timeout: seconds from now within which the summaries are wanted.
        priority: who goes first where texts wait.
    """

    timeout: float | None = None
    priority: Priority = Priority.INTERACTIVE


OnDelta = Callable[[int, str], None]
OnSummary = Callable[[int, Summary], None]


@dataclass(frozen=True)
class Options:
    """A request's parameters after defaults, limits and old spellings."""

    params: GenerationParams
    overflow: str
    clean_up_spaces: bool | None
    with_tokens: bool
    with_alternatives: bool


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
        self.metrics.admitted_requests.set_function(lambda: self.admission.requests)
        self.metrics.service_rate.set_function(lambda: self.admission.tokens_per_second)

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
        self,
        texts: Sequence[str],
        options: Options,
        pointer: Pointer,
        terms: Terms = Terms(),
        on_delta: OnDelta | None = None,
        on_summary: OnSummary | None = None,
    ) -> tuple[list[Summary], Timings]:
        """One summary a text, in order. Cancelling it aborts every text that is not done.

        Args:
            on_delta: called with a text's index and the next part of its summary, as soon as no step can change it;
                the parts of a text are its summary.
            on_summary: called with a text's index and its summary, behind its last part.

        Raises:
            RequestError: a text or the batch cannot be accepted; nothing was computed.
            QueueFull: no room now.
            DeadlineExceeded: the terms' time is over; what was not done is aborted.
            EngineError: a text failed; the others of the request are aborted.
        """
        current().summarizing()
        # Before the timeout begins: where it ends the work, the engine's clock has passed the deadline as well.
        deadline = math.inf if terms.timeout is None else time.monotonic() + terms.timeout
        try:
            async with asyncio.timeout(terms.timeout):
                with self.admission.request():
                    return await self._summarize(texts, options, pointer, terms, deadline, on_delta, on_summary)
        except TimeoutError:
            raise DeadlineExceeded(f"The summaries were not done within {terms.timeout:g} s.") from None

    async def _summarize(
        self,
        texts: Sequence[str],
        options: Options,
        pointer: Pointer,
        terms: Terms,
        deadline: float,
        on_delta: OnDelta | None,
        on_summary: OnSummary | None,
    ) -> tuple[list[Summary], Timings]:
        started = time.perf_counter()
        trace = current()
        self._check_batch(texts, pointer)
        with trace.stage("tokenize"):
            encoded = await asyncio.to_thread(self.tokenizer.encode, texts, options.overflow, pointer)
        tokenization = time.perf_counter() - started

        async def one(index: int, text: EncodedText) -> tuple[Summary, SequenceOutput]:
            certain = self._certain_text(options)
            tell = None if on_delta is None else (lambda ids: _send(on_delta, index, certain.advance(ids)))
            submitted = time.time_ns()
            output = await self.engine.submit(
                text.ids, options.params, priority=terms.priority, deadline=deadline, on_certain=tell
            )
            summary = self._summary(text, output, options)
            seconds = {"queue": output.queue_seconds, "encode": output.encode_seconds, "decode": output.decode_seconds}
            trace.text(index, submitted, seconds, (summary.input_tokens, summary.output_tokens))
            if on_delta is not None:
                _send(on_delta, index, certain.finish(summary.summary_text))
            if on_summary is not None:
                on_summary(index, summary)
            return summary, output

        pairs = await self._all(encoded, one)
        summaries, outputs = [summary for summary, _ in pairs], [output for _, output in pairs]
        self._count(summaries, outputs)
        trace.usage(sum(s.input_tokens for s in summaries), sum(s.output_tokens for s in summaries))
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

    async def _all(
        self,
        encoded: Sequence[EncodedText],
        one: Callable[[int, EncodedText], Coroutine[Any, Any, tuple[Summary, SequenceOutput]]],
    ) -> list[tuple[Summary, SequenceOutput]]:
        """Admit all texts or none, run `one` for each, and give a text's room back when it is done."""
        tokens = [len(text.ids) for text in encoded]
        self.admission.admit(sum(tokens))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, text)) for index, text in enumerate(encoded)]
                for task, count in zip(tasks, tokens, strict=True):
                    task.add_done_callback(partial(self._release, count))
        except ExceptionGroup as failures:
            raise _first(failures) from None
        return [task.result() for task in tasks]

    def _release(self, tokens: int, done: asyncio.Task[tuple[Summary, SequenceOutput]]) -> None:
        self.admission.finish(tokens, served=not done.cancelled() and done.exception() is None)

    def _certain_text(self, options: Options) -> CertainText:
        # Clean-up looks at more than one token: what it may still change is not certain.
        held_back = CLEAN_UP_REACH if options.clean_up_spaces else 0
        return CertainText(partial(self.tokenizer.decode, clean_up_spaces=options.clean_up_spaces), held_back)

    def _summary(self, text: EncodedText, output: SequenceOutput, options: Options) -> Summary:
        hypotheses = [self._alternative(hypothesis, options) for hypothesis in output.hypotheses]
        on_request: dict[str, Any] = {"alternatives": hypotheses} if options.with_alternatives else {}
        return Summary(
            **hypotheses[0].model_dump(exclude_unset=True),
            input_tokens=len(text.ids),
            source_tokens=text.source_tokens,
            truncated=text.truncated,
            **on_request,
        )

    def _alternative(self, hypothesis: Hypothesis, options: Options) -> Alternative:
        on_request: dict[str, Any] = {}
        if options.with_tokens:
            on_request = {
                "token_ids": list(hypothesis.token_ids),
                "token_logprobs": list(hypothesis.token_logprobs),
            }
        return Alternative(
            summary_text=self.tokenizer.decode(hypothesis.token_ids, options.clean_up_spaces),
            score=hypothesis.score,
            finish_reason=hypothesis.finish_reason,
            output_tokens=len(hypothesis.token_ids),
            **on_request,
        )

    def _count(self, summaries: Sequence[Summary], outputs: Sequence[SequenceOutput]) -> None:
        for summary, output in zip(summaries, outputs, strict=True):
            self.metrics.texts.inc()
            self.metrics.texts_truncated.inc(summary.truncated)
            self.metrics.source_tokens.inc(summary.input_tokens)
            self.metrics.output_tokens.inc(summary.output_tokens)
            self.metrics.queue_duration.observe(output.queue_seconds)
            self.metrics.inference_duration.observe(output.encode_seconds + output.decode_seconds)


def _send(on_delta: OnDelta, index: int, delta: str) -> None:
    if delta:
        on_delta(index, delta)


def generation_params(parameters: Parameters, defaults: GenerationParams, limits: RequestLimits) -> GenerationParams:
    """The checkpoint's options with the request's laid over them; where they do not fit, the checkpoint's give way.

    Raises:
        InvalidRequest: the request says two things at once, or exceeds a limit.
    """
    given = _given_options(parameters)
    longest = _length(given, "max_length", "max_new_tokens")
    shortest = _length(given, "min_length", "min_new_tokens")
    where = {name: place for name, (_, place) in given.items()}
    asked = {name: _frozen(value) for name, (value, _) in given.items() if not name.startswith(("max_", "min_"))}
    fitted = _fitted(defaults, asked, limits.max_num_beams)
    samples = fitted["num_return_sequences"] if _independent(fitted) else 0
    for name, value, limit, setting in (
        ("num_beams", fitted["num_beams"], limits.max_num_beams, "PRECIS_MAX_NUM_BEAMS"),
        ("num_return_sequences", samples, limits.max_num_beams, "PRECIS_MAX_NUM_BEAMS"),
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
    _check_together(fitted, where)
    _check_vocabulary(asked, where, limits.vocab_size)
    asked |= _forced(defaults, asked, where)
    if asked.get("encoder_no_repeat_ngram_size") and not limits.one_vocabulary:
        message = (
            f"encoder_no_repeat_ngram_size is {asked['encoder_no_repeat_ngram_size']}; with this model it must be 0: "
            "its encoder and its decoder have vocabularies of their own."
        )
        raise _invalid(where["encoder_no_repeat_ngram_size"], message)
    max_new_tokens = defaults.max_new_tokens if longest is None else longest
    min_new_tokens = defaults.min_new_tokens if shortest is None else shortest
    return replace(
        defaults,
        **{
            **asked,
            **fitted,
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
    outside = [token for token in params.token_ids() if token >= limits.vocab_size]
    if outside:
        raise ValueError(f"token id {outside[0]} is not below the vocabulary's size, {limits.vocab_size}")
    if params.encoder_no_repeat_ngram_size and not limits.one_vocabulary:
        raise ValueError("encoder_no_repeat_ngram_size must be 0: encoder and decoder have vocabularies of their own")
    max_new_tokens = min(params.max_new_tokens, limits.max_output_tokens)
    return replace(
        params,
        **_fitted(params, {}, limits.max_num_beams),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(params.min_new_tokens, max_new_tokens),
    )


def _fitted(defaults: GenerationParams, asked: Mapping[str, Any], max_num_beams: int) -> dict[str, Any]:
    """The options that bound one another: as asked, and the defaults as far as they fit what was asked."""
    num_beams = asked.get("num_beams", min(defaults.num_beams, max_num_beams))
    do_sample = asked.get("do_sample", defaults.do_sample and asked.get("num_beam_groups", 1) == 1)
    groups = asked.get("num_beam_groups", 1 if do_sample else math.gcd(defaults.num_beam_groups, num_beams))
    most = max_num_beams if do_sample and num_beams == 1 else num_beams
    return {
        "num_beams": num_beams,
        "do_sample": do_sample,
        "num_beam_groups": groups,
        "diversity_penalty": asked.get("diversity_penalty", defaults.diversity_penalty if groups > 1 else 0.0),
        "num_return_sequences": asked.get("num_return_sequences", min(defaults.num_return_sequences, most)),
    }


def _independent(options: Mapping[str, Any]) -> bool:
    """Whether returned sequences are samples that know nothing of one another, instead of beams."""
    return bool(options["do_sample"]) and options["num_beams"] == 1


def _check_together(options: Mapping[str, Any], where: Mapping[str, str]) -> None:
    """Refuse what does not go together; `_fitted` made sure that it is the request that says so."""
    beams, groups, returns = (options[name] for name in ("num_beams", "num_beam_groups", "num_return_sequences"))
    if returns > beams and not _independent(options):
        message = f"num_return_sequences is {returns}, more than num_beams, which is {beams}."
        raise _invalid(where["num_return_sequences"], message)
    if groups > 1 and options["do_sample"]:
        raise _invalid(where["num_beam_groups"], f"num_beam_groups is {groups}; with do_sample it must be 1.")
    if beams % groups:
        message = f"num_beam_groups is {groups}; it must divide num_beams, which is {beams}."
        raise _invalid(where["num_beam_groups"], message)
    if groups == 1 and options["diversity_penalty"]:
        message = f"diversity_penalty is {options['diversity_penalty']}, but num_beam_groups is 1."
        raise _invalid(where["diversity_penalty"], message)


def _forced(defaults: GenerationParams, asked: Mapping[str, Any], where: Mapping[str, str]) -> dict[str, Any]:
    """The tokens that are forced, and those that are never said: no token is both."""
    never = asked.get("suppress_tokens", defaults.suppress_tokens)
    forced = {name: asked.get(name, getattr(defaults, name)) for name in FORCED}
    for name, token in forced.items():
        if token not in never:
            continue
        if name not in asked:
            forced[name] = None
        elif "suppress_tokens" not in asked:
            never = tuple(other for other in never if other != token)
        else:
            raise _invalid(where[name], f"{name} is {token}, which suppress_tokens forbids.")
    return {**forced, "suppress_tokens": never}


def _check_vocabulary(asked: Mapping[str, Any], where: Mapping[str, str], vocab_size: int) -> None:
    for name in TOKEN_OPTIONS:
        for token, place in _tokens(asked.get(name), where.get(name, "")):
            if token >= vocab_size:
                message = f"{name} has token id {token}; the largest is {vocab_size - 1}, the vocabulary's size less 1."
                raise _invalid(place, message)


def _tokens(value: Any, place: str) -> Iterator[tuple[int, str]]:
    """Every token id in an option's value, with its JSON pointer."""
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _tokens(part, f"{place}/{index}")
    elif value is not None:
        yield value, place


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


def _frozen(value: Any) -> Any:
    """Lists of a body as the tuples that options are made of."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _invalid(pointer: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, [{"pointer": pointer, "message": message}])


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
