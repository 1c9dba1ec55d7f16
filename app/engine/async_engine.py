"""The only thread and the only bridge to asyncio: an inbox into the engine thread, futures out of it.

Knows when the engine lives and how long since it last moved. Does not know tokens, text or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace

from app.engine.allocator import give_back_unused
from app.engine.config import GenerationParams
from app.engine.engine import Engine
from app.engine.sequence import Priority, Sequence, SequenceOutput, SequenceStatus
from app.engine.tally import Distribution, Tally
from app.errors import DeadlineExceeded, EngineFailed, EngineStopped

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.25  # an idle engine beats its heart this often
GIVE_BACK_SECONDS = 30.0  # so often memory that nobody uses goes back; when the work ends, too
WARM_UP_LENGTHS = (8, 64, 256)  # source tokens; together they touch the kernels that real texts use


@dataclass(frozen=True)
class EngineStats:
    """Numbers for metrics, read without a lock: each is right, together they may be a step apart.

    Attributes:
        cancelled: texts whose callers left before their deadline.
        late_waiting: texts dropped before they were encoded, because of their deadline.
        late_running: texts dropped while they were decoded, because their deadline passed.
        encode_seconds, step_seconds, step_texts, rows: see `Tally`.
    """

    waiting: int
    running: int
    slots: int
    cancelled: int
    late_waiting: int
    late_running: int
    encode_seconds: Distribution
    step_seconds: Distribution
    step_texts: Distribution
    rows: int


OnCertain = Callable[[tuple[int, ...]], None]


@dataclass
class _Submitted:
    sequence: Sequence
    future: asyncio.Future[SequenceOutput]
    loop: asyncio.AbstractEventLoop
    on_certain: OnCertain | None
    told: int = 0  # of the sequence's certain tokens


@dataclass(frozen=True)
class _Abort:
    sequence: Sequence


class AsyncEngine:
    """Runs an `Engine` in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[_Submitted | _Abort | None] = queue.SimpleQueue()
        self._pending: dict[int, _Submitted] = {}
        self._thread = threading.Thread(target=self._run, name="precis-engine", daemon=True)
        self._warm = threading.Event()
        self._stopping = False
        self._closed = False  # nobody reads the inbox any more
        self._heartbeat = self._gave_back = time.monotonic()
        self._has_worked = True  # since memory went back: it has loaded and warms up
        self._cancelled = self._late_waiting = self._late_running = 0

    def start(self) -> None:
        """Start the thread, which warms up first; returns at once, see `ready`."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether it is warm and alive."""
        return self._warm.is_set() and self.alive

    def heartbeat_age(self) -> float:
        """Seconds since the thread last finished a step or an idle wait."""
        return time.monotonic() - self._heartbeat

    def stats(self) -> EngineStats:
        """Counts since the start, and the load now."""
        scheduler, tally = self.engine.scheduler, self.engine.tally
        return EngineStats(
            waiting=max(0, len(self._pending) - len(scheduler.running)),
            running=len(scheduler.running),
            slots=self.engine.config.max_num_seqs,
            cancelled=self._cancelled,
            late_waiting=self._late_waiting + tally.late,
            late_running=self._late_running,
            encode_seconds=tally.encode_seconds,
            step_seconds=tally.step_seconds,
            step_texts=tally.step_texts,
            rows=tally.rows,
        )

    async def submit(
        self,
        source_ids: ListLike[int],
        params: GenerationParams,
        *,
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = math.inf,
        on_certain: OnCertain | None = None,
    ) -> SequenceOutput:
        """Decode one source. Cancelling the awaiting task aborts the sequence, whose slot is free at the next step.

        Args:
            priority: who is admitted first.
            deadline: on `time.monotonic()`'s clock; what cannot be done by then is not begun.
            on_certain: called on the event loop with the tokens that the best hypothesis is certain to begin with, each
                time there are more of them.

        Raises:
            DeadlineExceeded: it was not begun, because of its deadline.
            EngineFailed: this sequence, or the step it was in, failed.
            EngineStopped: the engine is not running.
        """
        if self._stopping or not self.alive:
            raise EngineStopped("the engine is not running")
        loop = asyncio.get_running_loop()
        streams = on_certain is not None
        sequence = Sequence(tuple(source_ids), params, priority=priority, deadline=deadline, streams=streams)
        submitted = _Submitted(sequence, loop.create_future(), loop, on_certain)
        self._pending[submitted.sequence.id] = submitted
        self._inbox.put(submitted)
        if self._closed:  # the thread ended between the check above and here
            self._fail_pending(EngineStopped("the engine is not running"))
        try:
            return await submitted.future
        except asyncio.CancelledError:
            self._inbox.put(_Abort(submitted.sequence))
            raise

    async def stop(self, timeout: float) -> None:
        """Take no more work, finish what was taken within `timeout` seconds, and end the thread."""
        self._stopping = True
        self._inbox.put(None)
        if self.alive:
            await asyncio.to_thread(self._thread.join, timeout)
        self._fail_pending(EngineStopped("the engine stopped before this text was done"))

    def _run(self) -> None:
        try:
            self._warm_up()
            self.engine.tally = Tally(self.engine.config.max_num_seqs)  # what callers asked for, and nothing else
            self._heartbeat = time.monotonic()
            self._warm.set()
            while not self._stopping or self.engine.scheduler.has_work or not self._inbox.empty():
                self._read_inbox(block=not self.engine.scheduler.has_work)
                if self.engine.scheduler.has_work:
                    for sequence in self.engine.step():
                        self._deliver(sequence)
                    for sequence in self.engine.scheduler.running:
                        if sequence.streams:
                            self._tell(sequence)
                    self._has_worked = True
                    self._give_back(after=GIVE_BACK_SECONDS)
                else:
                    self._give_back(after=0.0 if self._has_worked else GIVE_BACK_SECONDS)
                self._heartbeat = time.monotonic()
        except BaseException as error:
            logger.exception("the engine thread died")
            self._fail_pending(EngineStopped(f"the engine thread died: {type(error).__name__}"))
            raise

    def _give_back(self, after: float) -> None:
        """Give memory back that nobody uses, if that was so many seconds ago or more.

        Of all threads: a burst of tokenising leaves some too. It takes milliseconds, and the next steps a few more.
        """
        if time.monotonic() - self._gave_back >= after:
            give_back_unused()
            self._gave_back, self._has_worked = time.monotonic(), False

    def _warm_up(self) -> None:
        """Run what most requests will run, the checkpoint's own options: on CUDA, each size of a step is recorded."""
        info, engine = self.engine.info, self.engine
        own = GenerationParams.from_generation_config(engine.generation_config)
        if own.rows > engine.config.max_num_beams:
            own = GenerationParams(num_beams=engine.config.max_num_beams)
        longest = min(4, engine.max_output_tokens)
        params = replace(own, max_new_tokens=longest, min_new_tokens=longest)
        for slots in engine.runner.buckets.slots or (1,):
            for length in WARM_UP_LENGTHS:
                # Token 0: the encoder may have another vocabulary than the one that special tokens are of.
                engine.generate([[0] * min(length, info.max_source_tokens)] * slots, params)

    def _read_inbox(self, block: bool) -> None:
        """Move everything in the inbox to the scheduler; when there is no work, wait for it."""
        try:
            message = self._inbox.get(timeout=IDLE_SECONDS) if block else self._inbox.get_nowait()
            while True:
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, message: _Submitted | _Abort | None) -> None:
        if isinstance(message, _Submitted):
            try:
                self.engine.add(message.sequence)
            except ValueError as error:
                message.sequence.fail(str(error))
                self._deliver(message.sequence)
        elif isinstance(message, _Abort) and self._pending.pop(message.sequence.id, None) is not None:
            self._count_aborted(message.sequence)
            self.engine.scheduler.abort(message.sequence)

    def _count_aborted(self, sequence: Sequence) -> None:
        """Whoever waited gave up: left, or was told by the clock to."""
        if time.monotonic() < sequence.deadline:
            self._cancelled += 1
        elif sequence.status is SequenceStatus.RUNNING:
            self._late_running += 1
        else:
            self._late_waiting += 1

    def _tell(self, sequence: Sequence) -> None:
        """Hand on the tokens that have become certain."""
        submitted = self._pending.get(sequence.id)
        if submitted is None or submitted.on_certain is None or len(sequence.certain_ids) <= submitted.told:
            return
        submitted.told = len(sequence.certain_ids)
        _call_soon(submitted.loop, submitted.on_certain, sequence.certain_ids)

    def _deliver(self, sequence: Sequence) -> None:
        submitted = self._pending.pop(sequence.id, None)
        if submitted is None:  # its caller left in the step in which it finished
            return
        error = DeadlineExceeded if sequence.is_late else EngineFailed
        _resolve_soon(submitted, sequence.output or error(sequence.error or "no output"))

    def _fail_pending(self, error: EngineStopped) -> None:
        self._closed = True
        for sequence_id in list(self._pending):
            submitted = self._pending.pop(sequence_id, None)
            if submitted is not None:
                _resolve_soon(submitted, error)


def _resolve_soon(submitted: _Submitted, outcome: SequenceOutput | Exception) -> None:
    def resolve() -> None:
        if submitted.future.done():
            return
        if isinstance(outcome, Exception):
            submitted.future.set_exception(outcome)
        else:
            submitted.future.set_result(outcome)

    _call_soon(submitted.loop, resolve)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed: nobody waits any more
        logger.debug("a result came after its event loop had closed")
