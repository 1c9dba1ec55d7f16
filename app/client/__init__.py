"""The Python client of a Precis server: `Summarizer`, and `AsyncSummarizer` for code that awaits. See docs/client.md.

Needs httpx, httpx-sse and pydantic. Knows the HTTP contract; does not know the server's code, torch or FastAPI.
"""

from app.client.asynchronous import AsyncSummarizer
from app.client.errors import (
    BadReply,
    BatchTooLarge,
    BodyTimeout,
    BodyTooLarge,
    ClientError,
    DeadlineExceeded,
    EngineError,
    EngineFailed,
    EngineStopped,
    InputTooLong,
    InternalError,
    InvalidRequest,
    MalformedJSON,
    NoReply,
    NotAcceptable,
    NotReady,
    QueueFull,
    RateLimited,
    RequestError,
    Unauthorized,
    UnknownModel,
    UnsupportedMedia,
)
from app.client.models import Alternative, Delta, Health, Info, Limits, StreamedSummary, Summary, TokenCount
from app.client.options import Options, Priority
from app.client.retry import RetryPolicy
from app.client.synchronous import Summarizer

__all__ = [
    "Alternative",
    "AsyncSummarizer",
    "BadReply",
    "BatchTooLarge",
    "BodyTimeout",
    "BodyTooLarge",
    "ClientError",
    "DeadlineExceeded",
    "Delta",
    "EngineError",
    "EngineFailed",
    "EngineStopped",
    "Health",
    "Info",
    "InputTooLong",
    "InternalError",
    "InvalidRequest",
    "Limits",
    "MalformedJSON",
    "NoReply",
    "NotAcceptable",
    "NotReady",
    "Options",
    "Priority",
    "QueueFull",
    "RateLimited",
    "RequestError",
    "RetryPolicy",
    "StreamedSummary",
    "Summarizer",
    "Summary",
    "TokenCount",
    "Unauthorized",
    "UnknownModel",
    "UnsupportedMedia",
]
