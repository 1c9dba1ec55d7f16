"""The server with parts that fail on request: `python -m tests.e2e.faulty_server` in place of `python -m app`.

A text that holds `fault:NAME` sets the fault off for its own sequence; `POST /block` stops the event loop for a while.
With the argument `disk`, reading the weights fails. Only here: the service itself has no hooks.
"""

from __future__ import annotations

import errno
import re
import sys
import time
from typing import Any

import torch
from fastapi import FastAPI

import app.__main__ as program
from app.engine import Engine, Sequence, checkpoint
from app.engine.model_runner import ModelRunner
from app.main import create_app
from app.tokenization import EncodedText, Tokenizer

OOM_STEP = 3  # counted from the start of the sequence that asked for it
SECONDS = 2.0  # that a blocked loop or a hung engine takes
BLOCKING = "the event loop is blocked"

FAULTS: dict[tuple[int, ...], str] = {}  # source ids -> the fault that their text names


def fault_of(sequence: Sequence) -> str | None:
    """What this sequence's text asked for."""
    return FAULTS.get(sequence.source_ids)


def install_tokenizer_faults() -> None:
    """Remember who asked for what; `fault:tokenizer` raises, with the text in the message, as libraries do."""
    encode = Tokenizer.encode

    def faulty(self: Tokenizer, texts: list[str], *arguments: Any, **keywords: Any) -> list[EncodedText]:
        encoded = encode(self, texts, *arguments, **keywords)
        for text, result in zip(texts, encoded, strict=True):
            if found := re.search(r"fault:(\w+)", text):
                FAULTS[result.ids] = found[1]
                if found[1] == "tokenizer":
                    raise RuntimeError(f"cannot tokenise {text}")
        return encoded

    Tokenizer.encode = faulty  # type: ignore[assignment, method-assign]


def install_runner_faults() -> None:
    """`fault:encoder` raises, `fault:nan` poisons what was encoded, `fault:oom` runs out of memory at a step."""
    admit, step = ModelRunner.admit, ModelRunner.step

    def faulty_admit(self: ModelRunner, sequences: list[Sequence]) -> None:
        if any(fault_of(sequence) == "encoder" for sequence in sequences):
            raise RuntimeError("the encoder failed")
        admit(self, sequences)
        for batch in self.batches.values():
            for slot, sequence in enumerate(batch.sequences):
                if fault_of(sequence) == "nan":
                    batch.cache.cross_values[:, slot] = torch.nan

    def faulty_step(self: ModelRunner) -> None:
        for batch in self.batches.values():
            for length, sequence in zip(batch.lengths, batch.sequences, strict=True):
                if fault_of(sequence) == "oom" and length > OOM_STEP:
                    raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    # Cache writes belong into inference mode, as in the runner itself.
    ModelRunner.admit = torch.inference_mode()(faulty_admit)  # type: ignore[method-assign]
    ModelRunner.step = faulty_step  # type: ignore[method-assign]


def install_engine_faults() -> None:
    """`fault:death` ends the engine thread between two steps, `fault:hang` keeps it from moving for a while."""
    step = Engine.step
    hung: set[int] = set()

    def faulty(self: Engine) -> list[Sequence]:
        for sequence in self.scheduler.running:
            fault = fault_of(sequence)
            if fault == "death":
                raise SystemError("the engine thread's own state is torn")
            if fault == "hang" and sequence.id not in hung:
                hung.add(sequence.id)
                time.sleep(SECONDS)
        return step(self)

    Engine.step = faulty  # type: ignore[method-assign]


def install_block_route() -> None:
    """`POST /block` does what no route may do: it sleeps in the event loop, and prints `BLOCKING` before."""

    def create_app_with_block(*arguments: Any) -> FastAPI:
        application = create_app(*arguments)

        @application.post("/block")
        async def block() -> str:
            print(BLOCKING, flush=True)
            time.sleep(SECONDS)  # noqa: ASYNC251
            return "done"

        return application

    program.create_app = create_app_with_block  # type: ignore[assignment, attr-defined]


def install_disk_fault() -> None:
    """The weights' hashes were right, and the disk fails when they are read again."""

    def unreadable(file: object) -> dict[str, torch.Tensor]:
        raise OSError(errno.EIO, "Input/output error", str(file))

    checkpoint.load_file = unreadable  # type: ignore[attr-defined, assignment]


if __name__ == "__main__":
    if "disk" in sys.argv:
        sys.argv.remove("disk")
        install_disk_fault()
    install_tokenizer_faults()
    install_runner_faults()
    install_engine_faults()
    install_block_route()
    sys.exit(program.main())
