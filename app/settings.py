"""Every setting of the service, its default, its environment variable (`PRECIS_` + name) and how to choose its value.

Values come from the environment, then from `.env`. Does not know models; `resolve_device` and `resolve_dtype` are the
only lines here that ask torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Overflow = Literal["error", "truncate_tail", "truncate_head"]


class Settings(BaseSettings):
    """Read once at start; handed on explicitly."""

    model_config = SettingsConfigDict(
        env_prefix="PRECIS_", env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    host: Annotated[str, Field(description="Address to listen on. `0.0.0.0` in a container.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000

    model: Annotated[
        str | None,
        Field(
            description="What to serve: a folder in Hugging Face layout, `name` or `name@version` in the store, or a "
            "hub id `owner/name` (`owner/name@revision`). Default: the newest version of the store's first model."
        ),
    ] = None
    model_store: Annotated[Path, Field(description="Folder of `<name>/<version>/` entries.")] = Path("model_store")
    hub_token: Annotated[
        SecretStr | None, Field(description="For hub models that need one; otherwise the hub's own variables count.")
    ] = None

    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="`auto` takes cuda, then mps, then cpu."),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8"],
        Field(
            description="`auto` is bfloat16 on CUDA and on a CPU with bfloat16 instructions, else float32. "
            "float32 gives exactly the summaries of transformers' `generate`; int8 (CPU only) pays without bfloat16."
        ),
    ] = "auto"
    num_threads: Annotated[
        int | None,
        Field(ge=1, description="Threads of arithmetic on the CPU. Default: the container's CPU quota, else cores."),
    ] = None

    max_num_seqs: Annotated[
        int, Field(ge=1, description="Texts decoded together. More: more throughput, more memory, slower single texts.")
    ] = 16
    max_num_beams: Annotated[
        int, Field(ge=1, description="Most beams a request may ask for. Memory for caches grows with it.")
    ] = 8
    max_encode_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="Source tokens encoded between two decode steps; less: running texts stall less. Default: 1024 "
            "on a CPU, where a greater batch encodes no faster than its parts, else 16384.",
        ),
    ] = None
    max_output_tokens: Annotated[
        int | None,
        Field(ge=1, description="Most tokens of a summary, end token included. Default: the checkpoint's length."),
    ] = None

    max_queue_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Source tokens of all texts admitted and not finished; above it 429. A good value: the "
            "wait that callers accept times the source tokens a second that `/metrics` shows.",
        ),
    ] = 65536
    max_queue_requests: Annotated[
        int, Field(ge=1, description="Requests being answered, waiting ones included; above it 429.")
    ] = 256
    max_request_timeout: Annotated[
        float,
        Field(gt=0, description="Most seconds of work on a request; `X-Request-Timeout` asks for less. Then 504."),
    ] = 300.0
    max_batch_size: Annotated[int, Field(ge=1, description="Most texts in one request; above it 413.")] = 32
    max_body_bytes: Annotated[int, Field(ge=1, description="Most bytes of a request's body; above it 413.")] = 4 << 20
    max_header_bytes: Annotated[
        int, Field(ge=1024, description="Most bytes of a request's line and headers; above it 431.")
    ] = 16 << 10
    header_timeout: Annotated[
        float, Field(gt=0, description="Seconds for a request's line and headers to arrive; then 408.")
    ] = 10.0
    keep_alive_timeout: Annotated[
        int,
        Field(ge=1, description="Seconds that an idle connection stays open. Longer than a load balancer's own."),
    ] = 5
    body_timeout: Annotated[
        float,
        Field(gt=0, description="Seconds for a request's body to arrive, then 408; and for a reply to be taken."),
    ] = 30.0
    overflow: Annotated[
        Overflow, Field(description="What happens to a text over the token limit when the request does not say.")
    ] = "error"

    max_heartbeat_age: Annotated[
        float, Field(gt=0, description="Seconds without a sign of life from the engine before ready turns 503.")
    ] = 30.0
    drain_delay: Annotated[
        float,
        Field(ge=0, description="Seconds from SIGTERM to closing the listeners, with ready at 503. Kubernetes: 5."),
    ] = 0.0
    drain_timeout: Annotated[
        float, Field(gt=0, description="Seconds for the work in flight to finish after the listeners closed.")
    ] = 25.0

    predict_route: Annotated[
        str, Field(pattern=r"^/[^{}]*$", description="Path of Vertex AI's predict requests. Vertex AI sets it itself.")
    ] = "/predict"
    health_route: Annotated[
        str, Field(pattern=r"^/[^{}]*$", description="Path of Vertex AI's health checks. Vertex AI sets it itself.")
    ] = "/health"

    api_keys: Annotated[
        SecretStr | None, Field(description="`name:key` or `key`, comma separated; with any, requests need one.")
    ] = None
    api_keys_file: Annotated[Path | None, Field(description="The same, a line each; # begins a comment.")] = None
    allow_anonymous: Annotated[
        bool, Field(description="Start without keys on an address that others can reach: something in front decides.")
    ] = False
    rate_limit: Annotated[
        str | None, Field(description="Requests of each key (without keys: of each address), such as `600/minute`.")
    ] = None

    cors_origins: Annotated[
        list[str],
        NoDecode,
        Field(description="Origins whose pages may call, comma separated in the environment; `*` is any."),
    ] = ["*"]
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="How much is logged.")] = (
        "info"
    )
    log_format: Annotated[
        Literal["text", "json"], Field(description="`json` for machines that collect logs: an object a line.")
    ] = "text"

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def resolve_device(device: str) -> str:
    """`auto` becomes the best device there is."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` becomes bfloat16 where the device has instructions for it."""
    if dtype != "auto":
        return dtype
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    from app.engine.kernels import has_bfloat16

    return "bfloat16" if device == "cpu" and has_bfloat16() else "float32"


def resolve_max_encode_tokens(max_encode_tokens: int | None, device: str) -> int:
    """The setting, else what keeps the device busy and no more."""
    if max_encode_tokens is not None:
        return max_encode_tokens
    return 1024 if device == "cpu" else 16384


def resolve_num_threads(num_threads: int | None, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The setting, else the CPU quota of the container (cgroup v2, then v1), else the cores this process may use."""
    if num_threads is not None:
        return num_threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cpu_quota(cgroup: Path) -> float | None:
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    try:
        return float(quota) / float(period)
    except (ValueError, ZeroDivisionError):
        return None
