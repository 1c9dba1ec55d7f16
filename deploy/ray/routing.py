"""Which replica a request goes to: of two drawn by chance, the one whose engine has fewer source tokens to work off.

Serve's own router draws two and compares how many HTTP requests each has. A request holds 1 text or 32, of 10 tokens or
of 500, so that number says little about the wait. And before it draws it takes a replica of the proxy's own node, if
there is one that is not full, however long its queue: a network hop is nothing beside a summary, so nodes count for
nothing here. A replica's load is in source tokens: what this router has sent it and is not answered, counted at once,
and beyond that what came through others, as the engine reported it last. Replicas that are not ready are taken last:
one whose engine died has the shortest queue of all.

Pickled by value into Serve's proxies. Knows Serve's router and the header `content-length`; never reads a body.
"""

from __future__ import annotations

import math
import pickle
import random
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import FIFOMixin, RequestRouter

BYTES_PER_TOKEN = 4  # English; another language scales every replica's load alike
UNKNOWN_BYTES = 1200  # of a body that does not say its length
EARLY = 1000  # completions remembered whose requests have not been heard of


@dataclass
class Ledger:
    """What is known of one replica's work.

    Attributes:
        sent: tokens of requests that this router sent and that are not answered, by the request's id.
        others: tokens that came through other routers, at the last report.
        report: the number of that report.
    """

    sent: dict[str, float] = field(default_factory=dict)
    others: float = 0.0
    report: int = -1
    ready: bool = True

    @property
    def load(self) -> float:
        """Source tokens to work off; none is so large as a replica's that is not ready."""
        return sum(self.sent.values()) + self.others if self.ready else math.inf

    def read(self, stats: dict[str, Any]) -> None:
        """Take a replica's report in, once."""
        if stats.get("report", -1) != self.report:
            self.report = stats["report"]
            self.others = max(0.0, stats["tokens"] - sum(self.sent.values()))
            self.ready = bool(stats["ready"])


class EngineQueueRouter(FIFOMixin, RequestRouter):
    """Power of two choices, by source tokens."""

    def initialize_state(self, **_: Any) -> None:
        """Called once by Serve."""
        self.ledgers: dict[Hashable, Ledger] = {}
        self.early: deque[tuple[Hashable, str]] = deque(maxlen=EARLY)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called by Serve when replicas come, go, or report."""
        super().update_replicas(replicas)
        present = {replica.replica_id for replica in replicas}
        self.ledgers = {key: ledger for key, ledger in self.ledgers.items() if key in present}
        for replica in replicas:
            self.ledgers.setdefault(replica.replica_id, Ledger()).read(replica.routing_stats or {})

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Two by chance, the one with the lower load first; the other is asked where that one is full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # before it draws again, where both are full
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        two.sort(key=lambda replica: self.ledger(replica.replica_id).load)
        return [[replica] for replica in two]

    def on_request_routed(self, pending_request: Any, replica_id: Hashable, result: Any) -> None:
        """Called by Serve when a replica has taken a request."""
        super().on_request_routed(pending_request, replica_id, result)
        request_id = pending_request.metadata.internal_request_id
        # Serve says this when it has read that the replica accepted, and a refusal may be complete by then.
        if (replica_id, request_id) in self.early:
            self.early.remove((replica_id, request_id))
        else:
            self.ledger(replica_id).sent[request_id] = tokens(pending_request.args)

    def on_request_completed(self, replica_id: Hashable, internal_request_id: str) -> None:
        """Called by Serve when a request is answered, failed, or was left."""
        super().on_request_completed(replica_id, internal_request_id)
        if self.ledger(replica_id).sent.pop(internal_request_id, None) is None:
            self.early.append((replica_id, internal_request_id))

    def ledger(self, replica_id: Hashable) -> Ledger:
        """Of a replica that may be gone already."""
        return self.ledgers.get(replica_id) or Ledger()


def tokens(args: list[Any]) -> float:
    """Source tokens of a request, guessed from the length of its body; `args` is what Serve's HTTP proxy sends."""
    size: float = UNKNOWN_BYTES
    if args and isinstance(args[0], bytes):
        scope = pickle.loads(args[0])._asgi_scope  # written by the proxy, this very process
        if scope["method"] != "POST":
            return 0.0
        length = dict(scope["headers"]).get(b"content-length", b"")
        size = float(length) if length.isdigit() else UNKNOWN_BYTES
    return size / BYTES_PER_TOKEN
