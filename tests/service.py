"""The service without a model: a small WordPiece tokenizer, and a fake engine at the seam that echoes its source.

Does not know torch, so that HTTP is tested in milliseconds.
"""

from __future__ import annotations

import asyncio
import math
import string
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from fastapi import FastAPI
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from app.admission import Admission
from app.engine import Distribution, EngineStats, GenerationParams, Hypothesis, Priority, SequenceOutput
from app.main import create_app
from app.metrics import Metrics
from app.model_registry import ModelEntry
from app.runtime import LoadedModel
from app.schemas import Limits
from app.settings import Settings
from app.summarizer import RequestLimits, Summarizer
from app.tokenization import Tokenizer

LIMIT = 12
VOCAB_SIZE = 200
JAMO = "".join(chr(c) for c in range(0x1100, 0x1113)) + "".join(chr(c) for c in range(0x1161, 0x1176)) + "\u11ab"
ALPHABET = string.ascii_lowercase + string.digits + string.punctuation + JAMO
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["hello", "world", "un", "##aff", "##able", "the", "##ing"]


def backend_tokenizer(truncate_at: int | None = 4) -> BackendTokenizer:
    """A BERT tokenizer of letters and a few words, saved with truncation and padding as some checkpoints are."""
    pieces = [*SPECIAL, *ALPHABET, *(f"##{c}" for c in ALPHABET), *WORDS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BackendTokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    if truncate_at is not None:
        tokenizer.enable_truncation(truncate_at)
        tokenizer.enable_padding(length=20)
    return tokenizer


def read_settings(**values: Any) -> Settings:
    """Settings from these values and the environment, but no `.env`."""
    return Settings(**{"_env_file": None, **values})


class FakeEngine:
    """Gives each source back, one alternative a return; can be held, and can fail."""

    def __init__(self) -> None:
        self.ready = self.alive = False
        self.age = 0.0
        self.submitted: list[tuple[tuple[int, ...], GenerationParams]] = []
        self.terms: list[tuple[Priority, float]] = []
        self.cancelled = 0
        self.stopped = False
        self.error: Exception | None = None
        self.fail_after_telling: Exception | None = None
        self.score = -0.5
        self.open = asyncio.Event()
        self.open.set()

    def start(self) -> None:
        self.ready = self.alive = True

    def heartbeat_age(self) -> float:
        return self.age

    def stats(self) -> EngineStats:
        step_texts = Distribution([1, 2, 4])
        for texts in (1, 2, 3, 5):
            step_texts.observe(texts)
        return EngineStats(
            waiting=3,
            running=2,
            slots=16,
            cancelled=self.cancelled,
            late_waiting=0,
            late_running=0,
            encode_seconds=Distribution([0.1]),
            step_seconds=Distribution([0.1]),
            step_texts=step_texts,
            rows=44,
        )

    async def submit(
        self,
        source_ids: Sequence[int],
        params: GenerationParams,
        *,
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = math.inf,
        on_certain: Callable[[tuple[int, ...]], None] | None = None,
    ) -> SequenceOutput:
        self.submitted.append((tuple(source_ids), params))
        self.terms.append((priority, deadline))
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        for length in range(1, len(source_ids) - 1 if on_certain else 0):
            assert on_certain is not None
            on_certain(tuple(source_ids[1 : 1 + length]))
        if self.fail_after_telling is not None:
            raise self.fail_after_telling
        best = _hypothesis(source_ids[1:], self.score, "eos")
        others = [
            _hypothesis(source_ids[1:-1], self.score - i, "length") for i in range(1, params.num_return_sequences)
        ]
        return SequenceOutput((best, *others), 0.001, 0.002, 0.003)

    async def stop(self, timeout: float) -> None:
        self.stopped = True
        self.alive = self.ready = False


def _hypothesis(ids: Sequence[int], score: float, reason: Literal["eos", "length"]) -> Hypothesis:
    logprobs = tuple(score / (i + 1) for i in range(len(ids)))
    return Hypothesis(token_ids=tuple(ids), token_logprobs=logprobs, score=score, finish_reason=reason)


@dataclass
class Service:
    """A running application and the handles that tests pull."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: FakeEngine

    async def summarize(self, inputs: Any, **parameters: Any) -> httpx.Response:
        body = {"inputs": inputs, **({"parameters": parameters} if parameters else {})}
        return await self.client.post("/summarize", json=body)


def load_fake(settings: Settings, metrics: Metrics, engine: FakeEngine) -> LoadedModel:
    defaults = GenerationParams(num_beams=4, max_new_tokens=19, min_new_tokens=5)
    limits = RequestLimits(settings.max_batch_size, settings.max_num_beams, 30, VOCAB_SIZE)
    summarizer = Summarizer(
        tokenizer=Tokenizer(backend_tokenizer(), LIMIT),
        engine=engine,
        defaults=defaults,
        limits=limits,
        admission=Admission(settings.max_queue_tokens, settings.max_queue_requests),
        metrics=metrics,
        default_overflow=settings.overflow,
    )
    return LoadedModel(
        entry=ModelEntry("fake", "1.0", Path("nowhere"), "0" * 64, True),
        engine=engine,
        summarizer=summarizer,
        limits=Limits(
            max_input_tokens=LIMIT,
            max_output_tokens=30,
            max_num_beams=settings.max_num_beams,
            max_batch_size=settings.max_batch_size,
            max_body_bytes=settings.max_body_bytes,
            max_queue_tokens=settings.max_queue_tokens,
        ),
        num_parameters=0,
        device="cpu",
        dtype="float32",
        cache_bytes=0,
    )


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Service]:
    """The application after its start, over ASGI."""
    engine = FakeEngine()
    app = create_app(read_settings(**settings), lambda settings, metrics: load_fake(settings, metrics, engine))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield Service(app, client, engine)
    assert engine.stopped
