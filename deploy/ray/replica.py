"""What runs in each of Serve's replica processes: the application with its engine, and what Serve asks about it.

Serve's health check reads the engine's heartbeat, its autoscaler the texts in the engine, its router the source tokens
admitted. Knows the application and Serve's hooks. Does not know how many replicas there are, nor who asks.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from fastapi import FastAPI
from ray.serve.metrics import Gauge

from app import logs, tracing
from app.auth import ApiKeys, check_exposure
from app.main import create_app, load_model
from app.metrics import Metrics
from app.runtime import LoadedModel, Runtime
from app.settings import Settings
from deploy.ray.autoscaling import STAT


class EngineUnhealthy(RuntimeError):
    """The engine died, or gives no sign of life; Serve replaces the replica."""


class Replica:
    """One model on its device.

    Args:
        settings: as in app/settings.py, before the environment's PRECIS_ variables. Keys belong into the environment:
            what stands here is shown by Serve's dashboard.

    Raises:
        ModelError: the model is not there, or it cannot be served. Serve tries again and then reports the deployment
            as failed.
        InvalidSetting: no keys, and nobody said that none are needed.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        # Serve's proxies listen, on an address that is none of ours: take it for one that others can reach.
        self.settings = Settings(**{**settings, "host": "0.0.0.0"})
        check_exposure(self.settings, ApiKeys.from_settings(self.settings))
        logs.configure(self.settings.log_level, self.settings.log_format)
        self.metrics = Metrics()
        self.model: LoadedModel = load_model(self.settings, self.metrics)
        self.runtime: Runtime | None = None
        self._reports = itertools.count()
        self._gauges = {
            name: Gauge(name, description=description)
            for name, description in {
                "precis_queue_depth": "Texts waiting for a slot",
                "precis_running": "Texts being decoded",
                "precis_admitted_tokens": "Source tokens of texts admitted and not finished",
                "precis_heartbeat_age_seconds": "Since the engine last gave a sign of life",
            }.items()
        }

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, whose lifespan Serve runs: it starts the engine, and drains it at the end."""
        spans = tracing.from_environment(os.environ)
        app = create_app(self.settings, lambda *_: self.model, self.metrics, spans)
        self.runtime = app.state.runtime
        return app

    async def check_health(self) -> None:
        """Called by Serve every `health_check_period_s`; the third failure in a row ends the replica.

        Raises:
            EngineUnhealthy: as its name says.
        """
        if self.runtime is not None and self.runtime.status() == "failed":
            age = self.model.engine.heartbeat_age()
            alive = "lives" if self.model.engine.alive else "is dead"
            raise EngineUnhealthy(
                f"the engine thread {alive} and last moved {age:.1f} s ago; the limit is "
                f"{self.settings.max_heartbeat_age:g} s (PRECIS_MAX_HEARTBEAT_AGE)"
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for `autoscaling.py`, several times in each look-back period."""
        stats = self.model.engine.stats()
        for name, value in {
            "precis_queue_depth": stats.waiting,
            "precis_running": stats.running,
            "precis_admitted_tokens": self.model.summarizer.admission.tokens,
            "precis_heartbeat_age_seconds": self.model.engine.heartbeat_age(),
        }.items():
            self._gauges[name].set(value)
        return {STAT: float(stats.waiting + stats.running)}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve for `routing.py`, every `request_routing_stats_period_s`."""
        ready = self.runtime is not None and self.runtime.status() == "ok"
        return {"report": next(self._reports), "tokens": self.model.summarizer.admission.tokens, "ready": ready}
