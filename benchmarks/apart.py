"""`generate` in a process of its own, as a user has it who does not have the engine.

Beside an engine it has the engine's malloc (`app/engine/allocator.py`): on a CPU each of its large tensors then gets
fresh pages, in every step, and a step takes up to half as long again. Knows how to ask a process; what `Generate` does
and how it is timed is said in benchmarks/contenders.py.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.contenders import Generate, Sources, Timing

# What the engine's loading leaves in the environment of its own process.
_OF_THE_ENGINE = "THP_MEM_ALLOC_ENABLE"


class GenerateApart:
    """The same calls as `Generate` has, over there; with as many threads as torch has here. `close` ends the process.

    Raises:
        RuntimeError: the process has ended, or what `generate` raised there, by its name and message.
    """

    def __init__(self, folder: Path, dtype: str, device: str, settings: GenerationConfig | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, torch.get_num_threads(), folder, dtype, device, settings)
        self._process = context.Process(target=_answer, args=arguments, daemon=True)
        held = os.environ.pop(_OF_THE_ENGINE, None)
        try:
            self._process.start()
        finally:
            if held is not None:
                os.environ[_OF_THE_ENGINE] = held
        theirs.close()
        self.attention: str = self._read()

    def run(self, sources: Sources) -> Timing:
        """See `Generate`."""
        timing: Timing = self._ask("run", sources)
        return timing

    def generate(self, sources: Sources) -> list[list[int]]:
        """See `Generate`."""
        rows: list[list[int]] = self._ask("generate", sources)
        return rows

    def end_to_end(self, sources: Sources) -> float:
        """See `Generate`."""
        seconds: float = self._ask("end_to_end", sources)
        return seconds

    def close(self) -> None:
        """End the process, and wait for its end."""
        self._connection.close()
        self._process.join()

    def _ask(self, name: str, sources: Sources) -> Any:
        self._connection.send((name, [list(row) for row in sources]))
        return self._read()

    def _read(self) -> Any:
        try:
            answer, error = self._connection.recv()
        except EOFError as ended:
            self._process.join()
            raise RuntimeError(f"generate's process ended with status {self._process.exitcode}") from ended
        if error is not None:
            raise RuntimeError(error)
        return answer


def _answer(connection: Connection, threads: int, *of_generate: Any) -> None:
    """Over there: a `Generate`, and what it is asked for, until nobody asks any more."""
    torch.set_num_threads(threads)
    generate = Generate(*of_generate)
    connection.send((generate.attention, None))
    while True:
        try:
            name, sources = connection.recv()
        except EOFError:
            return
        try:
            connection.send((getattr(generate, name)(sources), None))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {error}"))
