"""One Ray for all stages of a run: the cluster that is named, or one started on this machine and ended with the run."""

import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.plan import Step
from pipelines.spec import Capacity

OBJECT_STORE_BYTES = 600_000_000  # stages pass numbers, not data: shards and weights go through the store
CONNECT_TIMEOUT_S = 5
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told that this runs
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# Of a Ray of one machine, whose every wake-up stops one of two threads of a training, for which the other waits. Each
# process of Ray takes 0.4% of two cores, since it wakes a hundred times a second.
LOCAL = {
    "RAY_enable_worker_prestart": "0",  # processes in advance, while those that are needed wait for the processor
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",  # idle processes that are kept for longer than a second
    "RAY_task_events_report_interval_ms": "0",  # for a dashboard that is not there
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # of its controller, which at 0.1 takes 3% of a core
    "RAY_worker_niceness": "0",  # Ray's own is 15, where whatever else runs on the machine comes first
    **dict.fromkeys(
        # What raylet looks at four to ten times a second: free resources and memory, the disk, idle processes.
        [
            "RAY_raylet_report_resources_period_milliseconds",
            "RAY_raylet_check_gc_period_milliseconds",
            "RAY_memory_monitor_refresh_ms",
            "RAY_local_fs_monitor_interval_ms",
            "RAY_kill_idle_workers_interval_ms",
            "RAY_object_manager_timer_freq_ms",
        ],
        "1000",
    ),
    "RAY_io_context_monitor_probe_interval_ms": "10000",  # whether raylet's and GCS's own threads are late
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",  # for an autoscaler that is not there
}


class NoRayError(RuntimeError):
    """Nobody answers at the address of a cluster."""


def logical_cpus(steps: Sequence[Step], serve: Capacity) -> int:
    """CPUs that a local Ray must have: for the largest stage, the service and one to spare. More than there are is
    fine: to Ray a CPU is a ticket, and a laptop runs several small workers on one core.
    """
    largest = max((step.place.most_workers * step.place.cpus for step in steps), default=0)
    return largest + serve.replicas[1] * serve.cpus + 1


def prepare(environment: MutableMapping[str, str], home: Path) -> None:
    """Settings that Ray reads, those already there kept, and its token: made by Ray it could be read by everybody."""
    for setting, value in (SETTINGS if environment.get("RAY_ADDRESS") else SETTINGS | LOCAL).items():
        environment.setdefault(setting, value)
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        token.chmod(0o600)


@contextmanager
def ray_running(address: str | None, cpus: int) -> Iterator[str]:
    """Connects to the cluster at `address`, or starts a local one with `cpus` tickets and ends it. After `prepare`.

    Yields the address at which other programs reach it. Raises NoRayError. The local one has no dashboard, which costs
    three seconds, 250 MB and 1.5% of two cores, and no helpers that nobody would ask anything.
    """
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address:
        _check(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise NoRayError(f"RAY_ADDRESS is {address}, and no Ray is there: {error}") from error
    else:
        ray.init(
            address="local",  # else it goes to whatever Ray was started on this machine last, also to one that is gone
            num_cpus=cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        _end_helpers()
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray's own print a trace for people who write Ray
            signal.signal(number, handler)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def end_data_helpers() -> None:
    """Of Ray Data, whose two actors outlive it, in a Ray that this process has started; others may use a cluster's."""
    import ray
    from ray._private import worker
    from ray.data._internal.stats import STATS_ACTOR_NAME, STATS_ACTOR_NAMESPACE

    if worker._global_node.is_head():
        for name, namespace in ((STATS_ACTOR_NAME, STATS_ACTOR_NAMESPACE), ("AutoscalingCoordinator",) * 2):
            with suppress(ValueError):  # there is none
                ray.kill(ray.get_actor(name, namespace))


def _end_helpers() -> None:
    """Of a Ray that this process has started: what passes on log lines (log_to_driver is off), what would add nodes,
    and what says that this runs. 80 MB and a second's start each, and the first takes 0.7% of two cores.
    """
    from ray._private import worker

    for end in ("kill_log_monitor", "kill_monitor", "kill_dashboard"):
        getattr(worker._global_node, end)(check_alive=False)


def _check(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in address:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
                pass
        except OSError as error:
            raise NoRayError(f"RAY_ADDRESS is {address}, and no Ray is there: {error.strerror or error}") from error
