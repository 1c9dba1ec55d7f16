"""The only thread and the only bridge to asyncio: an inbox into the engine thread, futures out of it.

Knows when the engine lives and how long since it last moved. Does not know tokens, text or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from app.engine.config import GenerationParams
from app.engine.engine import Engine
from app.engine.sequence import Sequence, SequenceOutput
from app.errors import EngineFailed, EngineStopped

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.25  # an idle engine beats its heart this often
WARM_UP_LENGTHS = (8, 64, 256)  # source tokens; together they touch the kernels that real texts use


@dataclass(frozen=True)
class EngineStats:
    """Numbers for metrics, read without a lock: each is right, together they may be a step apart."""

    waiting: int
    running: int
    slots: int
    steps: int
    tokens: int
    cancelled: int


@dataclass(frozen=True)
class _Submitted:
    sequence: Sequence
    future: asyncio.Future[SequenceOutput]
    loop: asyncio.AbstractEventLoop


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
        self._heartbeat = time.monotonic()
        self._steps = self._tokens = self._cancelled = 0

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
        scheduler = self.engine.scheduler
        return EngineStats(
            waiting=max(0, len(self._pending) - len(scheduler.running)),
            running=len(scheduler.running),
            slots=self.engine.config.max_num_seqs,
            steps=self._steps,
            tokens=self._tokens,
            cancelled=self._cancelled,
        )

    async def submit(self, source_ids: ListLike[int], params: GenerationParams) -> SequenceOutput:
        """Decode one source. Cancelling the awaiting task aborts the sequence, whose slot is free at the next step.

        Raises:
            EngineFailed: this sequence, or the step it was in, failed.
            EngineStopped: the engine is not running.
        """
        if self._stopping or not self.alive:
            raise EngineStopped("the engine is not running")
        loop = asyncio.get_running_loop()
        submitted = _Submitted(Sequence(tuple(source_ids), params), loop.create_future(), loop)
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
            self._heartbeat = time.monotonic()
            self._warm.set()
            while not self._stopping or self.engine.scheduler.has_work or not self._inbox.empty():
                self._read_inbox(block=not self.engine.scheduler.has_work)
                if self.engine.scheduler.has_work:
                    finished = self.engine.step()
                    self._steps += 1
                    self._tokens += len(finished) + len(self.engine.scheduler.running)
                    for sequence in finished:
                        self._deliver(sequence)
                self._heartbeat = time.monotonic()
        except BaseException as error:
            logger.exception("the engine thread died")
            self._fail_pending(EngineStopped(f"the engine thread died: {type(error).__name__}"))
            raise

    def _warm_up(self) -> None:
        info, engine = self.engine.info, self.engine
        longest = min(4, engine.max_output_tokens)
        params = GenerationParams.from_generation_config(engine.generation_config)
        beams = min(params.num_beams, engine.config.max_num_beams)
        for length in WARM_UP_LENGTHS:
            source = [info.start_token_id] * (min(length, info.max_source_tokens) - 1) + [info.eos_token_id]
            engine.generate([source], GenerationParams(num_beams=beams, max_new_tokens=longest))

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
            self.engine.scheduler.abort(message.sequence)
            self._cancelled += 1

    def _deliver(self, sequence: Sequence) -> None:
        submitted = self._pending.pop(sequence.id, None)
        if submitted is None:  # its caller left in the step in which it finished
            return
        outcome = sequence.output or EngineFailed(sequence.error or "no output")
        _resolve_soon(submitted, outcome)

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

    try:
        submitted.loop.call_soon_threadsafe(resolve)
    except RuntimeError:  # the loop is closed: nobody waits any more
        logger.debug("a result came after its event loop had closed")
