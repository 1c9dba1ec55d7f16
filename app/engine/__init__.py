"""The engine: token ids in, beam-searched token ids out, batched in flight. No HTTP, no text; torch only."""

from app.engine.async_engine import AsyncEngine, EngineStats
from app.engine.checkpoint import ModelInfo
from app.engine.config import FORCED, EngineConfig, GenerationParams
from app.engine.engine import Engine
from app.engine.sequence import Hypothesis, Priority, Sequence, SequenceOutput
from app.engine.tally import Distribution

__all__ = [
    "FORCED",
    "AsyncEngine",
    "Distribution",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "GenerationParams",
    "Hypothesis",
    "ModelInfo",
    "Priority",
    "Sequence",
    "SequenceOutput",
]
