"""The running parts of one application, as routes see them. Knows whether they are ready; does nothing by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from app.errors import NotReady
from app.metrics import Metrics
from app.model_registry import ModelEntry
from app.schemas import Limits
from app.settings import Settings
from app.summarizer import EngineSeam, Summarizer


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, not yet running."""

    entry: ModelEntry
    engine: EngineSeam
    summarizer: Summarizer
    limits: Limits
    num_parameters: int
    device: str
    dtype: str
    cache_bytes: int


@dataclass
class Runtime:
    """One for each application; `model` is None until it is loaded."""

    settings: Settings
    metrics: Metrics
    model: LoadedModel | None = None
    draining: bool = False
    versions: dict[str, Any] = field(default_factory=dict)

    def status(self) -> Literal["ok", "starting", "draining", "failed"]:
        """Whether requests should come here: loaded, warm, not draining, and the engine gave a sign of life lately."""
        if self.draining:
            return "draining"
        if self.model is None:
            return "starting"
        engine = self.model.engine
        if not engine.alive:
            return "failed"
        if not engine.ready:
            return "starting"
        return "ok" if engine.heartbeat_age() <= self.settings.max_heartbeat_age else "failed"

    def require_model(self) -> LoadedModel:
        """The model, for work. A draining server still works: its listeners are open so that nobody is refused.

        Raises:
            NotReady: no model, or its engine does not run.
        """
        if self.model is None or not self.model.engine.ready:
            raise NotReady("The model is not ready.")
        return self.model
