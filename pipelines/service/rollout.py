"""The service as one application of Ray Serve: gateways, and the replicas of one bundle, in a rollout of two.

A rollout is blue-green. The new bundle's replicas come up beside the old ones; each has made a real reply before Serve
calls it healthy. Then the gateways switch, requests that run end where they began, and the old replicas go. A bundle
that fails never meets a request, and the old one loses nothing.
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from pipelines.artifacts import Store
from pipelines.service.bundle import Bundle, RefusedError
from pipelines.service.gateway import Gateway
from pipelines.service.keys import Keys
from pipelines.service.protocol import Card
from pipelines.service.replica import Replica
from pipelines.service.scaling import TIMES
from pipelines.spec import Capacity

APP = "nanochat"
SWITCH_S = 1  # after which no gateway still asks the old replicas for something new
LIFE: dict[str, Any] = {
    "health_check_period_s": 2,  # who is gone is missed after this long
    "graceful_shutdown_timeout_s": 5,  # for answers that still run when the service ends: of a gateway
    "graceful_shutdown_wait_loop_s": 0.2,  # until it is seen that none is left
}
REPLIES_S = 300  # replies that run have so long when another bundle takes their replica's place
# Serve restarts what has a new version, and only reconfigures what has not. Its public options give everything a new
# version each time; a gateway that restarts would cut off its clients.
KEPT: dict[str, Any] = {"_internal": True, "version": "1"}
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)

logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the user reads what deploy.py says


@dataclass(frozen=True)
class Side:
    """The replicas of one bundle."""

    number: int  # of the rollout that brought it
    bundle: Bundle
    capacity: Capacity

    @property
    def name(self) -> str:
        """Of the deployment."""
        return f"Replica-{self.number}"

    def as_json(self) -> dict[str, Any]:
        """Serve keeps it so, as long as the service is up."""
        bundle = {"address": self.bundle.files.address, "dtype": self.bundle.dtype, "card": asdict(self.bundle.card)}
        return {"number": self.number, "bundle": bundle, "capacity": self.capacity.model_dump(mode="json")}

    @classmethod
    def from_json(cls, said: dict[str, Any], store: Store) -> "Side":
        """Raises StoreError or FileNotFoundError if the bundle is not in this store."""
        bundle = said["bundle"]
        files = store.data(bundle["address"])
        return cls(said["number"], Bundle(Card(**bundle["card"]), files, bundle["dtype"]), Capacity(**said["capacity"]))


def running() -> dict[str, Any] | None:
    """What the gateways were told last, on the Ray this process is connected to; None: there is no service."""
    if APP not in _applications():
        return None
    told: dict[str, Any] = serve.get_app_handle(APP).told.remote().result(timeout_s=30)
    return told


def roll_out(bundle: Bundle, capacity: Capacity, keys: Keys | None = None) -> str:
    """Puts the bundle in front of the users. Returns what was done, for a person. Raises RefusedError.

    keys: who may ask; None: everybody.
    """
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    told = running()
    if told is None:
        side = Side(1, bundle, capacity)
        try:
            _deploy([side], _told(side, None, keys))
        except RefusedError:
            end()
            raise
        return "is up"
    old = Side.from_json(told["now"], bundle.files.store)
    new = Side(old.number + 1, bundle, capacity)
    if replace(new, number=old.number).as_json() == told["now"]:
        if told["keys"] == (entries := keys and keys.entries):
            return "was up already"
        _deploy([old], {**told, "keys": entries})
        return "has new keys"
    _check_room(capacity)
    try:
        _deploy([old, new], told)
    except (RefusedError, KeyboardInterrupt):
        _deploy([old], told)
        raise
    told = _told(new, old, keys)
    _deploy([old, new], told)
    time.sleep(SWITCH_S)
    _deploy([new], told)
    return f"has replaced {old.bundle.files.address}"


def end() -> None:
    """Takes the service down and leaves what else Serve runs."""
    if APP in _applications():
        serve.delete(APP)


def bundle_before(store: Store) -> Bundle:
    """The bundle that served before the last rollout. Raises RefusedError, BrokenArtifactError or StoreError."""
    told = running()
    if told is None:
        raise RefusedError(1, "no service is up here, so there is nothing to roll back")
    if told["before"] is None:
        address = told["now"]["bundle"]["address"]
        raise RefusedError(1, f"{address} is the first bundle of this service; there is none before it")
    bundle = Side.from_json(told["before"], store).bundle
    manifest = store.read(bundle.files.address)
    store.verify(manifest)
    return bundle


def _told(now: Side, before: Side | None, keys: Keys | None) -> dict[str, Any]:
    """What Serve hands the gateways, and keeps: JSON. Of the keys it has the hashes."""
    sides = {"now": now.as_json(), "before": before and before.as_json()}
    return {"replica": now.name, **sides, "keys": keys and keys.entries}


def _deploy(sides: list[Side], told: dict[str, Any]) -> None:
    """Makes Serve run these replicas, with gateways that ask the one they are told."""
    replicas = [_replicas(side) for side in sides]
    gateway = serve.deployment(Gateway).options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000,
        user_config=told,
        logging_config=QUIET,
        **LIFE,
        **KEPT,
    )
    try:
        capacity = sides[-1].capacity
        front = gateway.bind(capacity.host, capacity.port, LIFE["graceful_shutdown_timeout_s"] - 1, *replicas)
        serve.run(front, name=APP, route_prefix=None)
    except RuntimeError as error:
        raise RefusedError(1, f"the service did not come up: {_why(error)}") from error


def _replicas(side: Side) -> serve.Application:
    capacity = side.capacity
    actor: dict[str, Any] = {"num_cpus": capacity.cpus}
    if capacity.gpu is not None:
        actor |= {"num_gpus": 1, "accelerator_type": capacity.gpu}
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_constructor_retry_count": 1,
        "max_ongoing_requests": 1_000_000,  # the replica itself says when it is full
        "request_router_config": RequestRouterConfig(
            request_router_class="pipelines.service.routing:PrefixRouter",
            request_router_kwargs={"kv_tokens": capacity.kv_tokens},
        ),
        "logging_config": QUIET,
        **LIFE,
        **KEPT,
        "graceful_shutdown_timeout_s": REPLIES_S,
    }
    fewest, most = capacity.replicas
    if fewest == most:
        options["num_replicas"] = most
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=fewest,
            initial_replicas=min(max(fewest, _count()), most),
            max_replicas=most,
            policy=AutoscalingPolicy(policy_function="pipelines.service.scaling:Policy"),
            **TIMES,
        )
    return serve.deployment(Replica, name=side.name).options(**options).bind(side.bundle, capacity)


def _applications() -> dict[str, ApplicationStatusOverview]:
    return dict(serve.status().applications)


def _count() -> int:
    """Replicas that run now: as many must come up, or the users would notice the rollout."""
    application = _applications().get(APP)
    deployments = application.deployments.items() if application else ()
    return max((sum(d.replica_states.values()) for name, d in deployments if name.startswith("Replica")), default=0)


def _check_room(capacity: Capacity) -> None:
    needed, free = capacity.replicas[0] * capacity.cpus, ray.available_resources().get("CPU", 0)
    if free < needed:
        said = f"a rollout runs both bundles for a moment: {needed} CPUs more, and {free:g} are free on this Ray"
        raise RefusedError(3, f"{said}; free some, or end the service first")


def _why(error: RuntimeError) -> str:
    """The last line that the deployment which failed has said; Serve's own error only names it."""
    application = _applications().get(APP)
    said = str(error)
    for deployment in application.deployments.values() if application else []:
        if deployment.status.name.endswith(("FAILED", "UNHEALTHY")):
            said = deployment.message
    return said.strip().splitlines()[-1].strip()
