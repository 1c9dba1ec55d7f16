"""A replica whose engine dies on request; what `tests.e2e.faulty_server` is for the server."""

from __future__ import annotations

from typing import Any

from deploy.ray.replica import Replica
from tests.e2e.faulty_server import install_engine_faults, install_tokenizer_faults


class FaultyReplica(Replica):
    """A text that holds `fault:death` ends its engine's thread."""

    def __init__(self, settings: dict[str, Any]) -> None:
        install_tokenizer_faults()
        install_engine_faults()
        super().__init__(settings)
