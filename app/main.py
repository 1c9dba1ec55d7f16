"""Builds the ASGI application: `create_app(settings)`, whose lifespan is load -> warm up -> serve -> drain -> stop.

Knows how the parts fit. Does not know sockets or signals: `__main__` does.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import platform
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from app import exception_handlers
from app.admission import Admission
from app.auth import OPEN_PATHS, ApiKeys, AuthMiddleware, parse_rate
from app.engine import AsyncEngine, Engine, EngineConfig
from app.errors import EngineFailed, ModelCorrupt
from app.metrics import Metrics
from app.middleware import RequestMiddleware
from app.model_registry import find_model
from app.routes import azure, health, info, kserve, open_inference, openapi, prometheus, sagemaker, summarize, vertex
from app.runtime import LoadedModel, Runtime
from app.schemas import Limits
from app.settings import Settings, resolve_device, resolve_dtype, resolve_max_encode_tokens, resolve_num_threads
from app.summarizer import EngineSeam, RequestLimits, Summarizer, default_params
from app.tokenization import DECODER_TOKENIZER, Tokenizer
from app.tracing import Tracing

logger = logging.getLogger(__name__)

WARM_UP_POLL_SECONDS = 0.02
_LIBRARIES = ("torch", "tokenizers", "safetensors", "fastapi", "pydantic", "uvicorn")
Loader = Callable[[Settings, Metrics], LoadedModel]


def create_app(
    settings: Settings,
    load: Loader | None = None,
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application.

    Args:
        load: gives the model when the application starts; tests put a small one at the seam.
        metrics: where a model that is already loaded counts.
        tracing: where spans go; without it, nowhere.
    """
    runtime = Runtime(settings, metrics or Metrics(), versions=library_versions())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        model = (load or load_model)(settings, runtime.metrics)
        runtime.metrics.watch_engine(model.engine.stats, model.engine.heartbeat_age)
        model.engine.start()
        try:
            await _warm(model.engine)
            runtime.model = model
            yield
            runtime.draining = True
        finally:
            await model.engine.stop(settings.drain_timeout)

    app = FastAPI(
        title="Precis",
        version=runtime.versions["precis"],
        description="Summaries over HTTP, with beam search and an exact token limit.",
        lifespan=lifespan,
        redirect_slashes=False,
        # FastAPI's own records query strings and the messages of exceptions, which may hold a text; ours is tracing.py.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.runtime = runtime
    app.state.metrics = runtime.metrics
    # Vertex AI first: its paths are the deployment's choice, which may be one of ours.
    app.include_router(vertex.router(settings.predict_route, settings.health_route))
    for routes in (summarize, health, info, prometheus, sagemaker, azure, kserve, open_inference):
        app.include_router(routes.router)
    openapi.install(app)
    exception_handlers.install(app)
    app.add_middleware(
        AuthMiddleware,
        keys=ApiKeys.from_settings(settings),
        rate=parse_rate(settings.rate_limit),
        open_paths=[*OPEN_PATHS, settings.health_route],
    )
    app.add_middleware(
        RequestMiddleware,
        metrics=runtime.metrics,
        tracing=tracing or Tracing(),
        model_name=lambda: runtime.model.entry.name if runtime.model else None,
        max_body_bytes=settings.max_body_bytes,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[
            *openapi.HEADERS,
            "x-error-message",
            "x-error-type",
            "retry-after",
            "ratelimit",
            "ratelimit-policy",
        ],
    )
    return app


def load_model(settings: Settings, metrics: Metrics) -> LoadedModel:
    """Find, verify and load what the settings name.

    Raises:
        ModelError: it is not there, or it cannot be served.
    """
    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    entry = find_model(settings.model, settings.model_store, token)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    torch.set_num_threads(resolve_num_threads(settings.num_threads))
    config = EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_beams=settings.max_num_beams,
        max_encode_tokens=resolve_max_encode_tokens(settings.max_encode_tokens, device),
        max_output_tokens=settings.max_output_tokens,
        device=device,
        dtype=dtype,
    )
    try:
        engine = Engine.from_folder(entry.folder, config)
    except ValueError as error:
        raise ModelCorrupt(str(error)) from error
    summarizer = build_summarizer(settings, metrics, entry.folder, engine, AsyncEngine(engine))
    cache_bytes = engine.runner.cache_bytes(summarizer.defaults.rows)
    limits = Limits(
        max_input_tokens=engine.info.max_source_tokens,
        max_output_tokens=engine.max_output_tokens,
        max_num_beams=settings.max_num_beams,
        max_batch_size=settings.max_batch_size,
        max_body_bytes=settings.max_body_bytes,
        max_queue_tokens=settings.max_queue_tokens,
    )
    return LoadedModel(
        entry, summarizer.engine, summarizer, limits, engine.info.num_parameters, device, dtype, cache_bytes
    )


def build_summarizer(
    settings: Settings, metrics: Metrics, folder: Path, engine: Engine, seam: EngineSeam
) -> Summarizer:
    """The summarizer of a loaded engine.

    Raises:
        ModelCorrupt: the checkpoint's own decode options are out of range, or there is no way to read its summaries.
    """
    limits = RequestLimits(
        settings.max_batch_size,
        settings.max_num_beams,
        engine.max_output_tokens,
        engine.info.vocab_size,
        engine.info.one_vocabulary,
    )
    try:
        defaults = default_params(engine.generation_config, limits)
    except ValueError as error:
        raise ModelCorrupt(f"{folder / 'generation_config.json'}: {error}") from error
    if not (engine.info.one_vocabulary or (folder / DECODER_TOKENIZER).exists()):
        raise ModelCorrupt(
            f"{folder}: the decoder's vocabulary is not the encoder's, and {DECODER_TOKENIZER} is missing"
        )
    return Summarizer(
        tokenizer=Tokenizer.from_folder(folder, engine.info.max_source_tokens),
        engine=seam,
        defaults=defaults,
        limits=limits,
        admission=Admission(settings.max_queue_tokens, settings.max_queue_requests),
        metrics=metrics,
        default_overflow=settings.overflow,
    )


async def _warm(engine: EngineSeam) -> None:
    while not engine.ready:
        if not engine.alive:
            raise EngineFailed("the engine died while it warmed up")
        await asyncio.sleep(WARM_UP_POLL_SECONDS)


def library_versions() -> dict[str, str]:
    """Of what results depend on."""
    versions = {"python": platform.python_version()}
    for name in ("precis", *_LIBRARIES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def greeting(runtime: Runtime, url: str) -> str:
    """What to print when ready: what is served, and a line to try it with."""
    body = '{"inputs": "' + openapi.CONVERSATION.replace("\n", "\\n") + '"}'
    return (
        f"{served(runtime)} Try:\n\n  curl {url}/summarize -H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
    )


def served(runtime: Runtime) -> str:
    """What is served, in a sentence."""
    model = runtime.model
    assert model is not None
    return (
        f"Precis serves {model.entry.name} {model.entry.version} on {model.device} in {model.dtype}; "
        f"at most {model.limits.max_input_tokens} tokens a text; "
        f"caches of {runtime.settings.max_num_seqs} texts with {model.summarizer.defaults.rows} beams: "
        f"{model.cache_bytes / 2**20:.0f} MiB."
    )
