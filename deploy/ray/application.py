"""The Serve application: `serve run deploy.ray.application:build model=NAME@VERSION num_gpus=1 max_replicas=8`.

Knows what Serve is told about replicas: what each takes, how many there may be, how old ones are replaced by new ones.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from app.settings import Settings
from deploy.ray.replica import Replica
from deploy.ray.routing import EngineQueueRouter

NAME = "precis"
PROBES = 16  # requests beside those that are admitted: health checks, scrapes, and what is refused at once
ROUTING = 1000  # requests in a proxy that no replica has taken: a moment's, or those that wait for the first replica
SHUTDOWN_SECONDS = 5.0  # beside the work in flight


class Arguments(BaseModel):
    """What can be said on the command line and in a Serve configuration file."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[str | None, Field(description="PRECIS_MODEL. Another one is a rolling upgrade.")] = None
    settings: Annotated[dict[str, Any], Field(description="Others of app/settings.py, by their names there.")] = {}
    num_cpus: Annotated[
        float, Field(gt=0, description="Of each replica; so many threads it computes with where it has no GPU.")
    ] = 1.0
    num_gpus: Annotated[float, Field(ge=0, description="Of each replica.")] = 0.0
    min_replicas: Annotated[int, Field(ge=1, description="Even without a request.")] = 1
    max_replicas: Annotated[int, Field(ge=1, description="However many requests there are.")] = 1
    texts_per_replica: Annotated[
        float | None,
        Field(gt=0, description="Running and waiting, when the number of replicas is right. Default: the slots."),
    ] = None
    metrics_interval_s: Annotated[float, Field(gt=0, description="Between an engine's reports to the autoscaler.")] = (
        2.0
    )
    look_back_period_s: Annotated[float, Field(gt=0, description="Texts are averaged over so long.")] = 10.0
    upscale_delay_s: Annotated[float, Field(ge=0, description="So long must more be wanted.")] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0, description="So long must fewer be wanted.")] = 300.0
    max_surge_percent: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            description="Replicas that an upgrade may have beyond their number, rounded up: old ones go when their "
            "successors are ready. It waits for ever where there is no room for them; with 0 old ones go first.",
        ),
    ] = 25
    routing_stats_period_s: Annotated[
        float, Field(gt=0, description="Between an engine's reports to the routers. Each is a call of the controller.")
    ] = 1.0
    health_check_period_s: Annotated[float, Field(gt=0, description="The third failure in a row is the end.")] = 5.0

    @model_validator(mode="after")
    def _in_order(self) -> Arguments:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, above max_replicas, which is {self.max_replicas}")
        if self.look_back_period_s <= self.metrics_interval_s:
            raise ValueError(
                f"look_back_period_s is {self.look_back_period_s:g}; it must be above metrics_interval_s, "
                f"which is {self.metrics_interval_s:g}"
            )
        return self


def build(arguments: Arguments) -> serve.Application:
    """Called by Serve."""
    return application(arguments, Replica)


def application(arguments: Arguments, replica: type[Replica]) -> serve.Application:
    """The same with another class of replicas, as tests have one that fails on request."""
    chosen = dict(arguments.settings)
    if arguments.model is not None:
        chosen["model"] = arguments.model
    # Ray counts cores and does not fence them: without a number each replica would compute with all.
    chosen.setdefault("num_threads", max(1, int(arguments.num_cpus)))
    settings = Settings(**chosen)
    texts = arguments.texts_per_replica or settings.max_num_seqs
    policy = AutoscalingPolicy(
        policy_function="deploy.ray.autoscaling:EngineQueuePolicy", policy_kwargs={"texts_per_replica": texts}
    )
    deployment = serve.deployment(
        serve.ingress()(replica),
        name=NAME,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        # The application refuses what is too much, with the time to come back; Serve's own queue, in the proxies, knows
        # no deadline and no priority, and must stay empty.
        max_ongoing_requests=settings.max_queue_requests + PROBES,
        max_queued_requests=ROUTING,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            # Ray 2.60 calls it deprecated and reads nothing else: the variables that are to replace it have no effect.
            metrics_interval_s=arguments.metrics_interval_s,
            look_back_period_s=arguments.look_back_period_s,
            upscale_delay_s=arguments.upscale_delay_s,
            downscale_delay_s=arguments.downscale_delay_s,
            policy=policy,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=EngineQueueRouter,
            request_routing_stats_period_s=arguments.routing_stats_period_s,
        ),
        health_check_period_s=arguments.health_check_period_s,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_timeout + SHUTDOWN_SECONDS,
        rolling_update_percentage=1.0,
        max_surge_percent=arguments.max_surge_percent,
    )
    return deployment.bind(chosen)
