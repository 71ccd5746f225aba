"""Brings a pipeline's service up on Ray Serve, asks it questions over HTTP, keeps it up, and leaves nothing behind."""

import errno
import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import Any, TextIO

from pipelines.artifacts import Store
from pipelines.load import Loaded
from pipelines.ray_local import ray_running
from pipelines.service.bundle import Bundle, RefusedError, find_bundle
from pipelines.service.client import Client, End, ServiceError
from pipelines.spec import Capacity

APP = "nanochat"
UP_TIMEOUT_S = 120
# Answers that still run when the service is told to end have 5 s; Serve looks every 0.2 s whether there are any.
DRAIN: dict[str, Any] = {"graceful_shutdown_timeout_s": 5, "graceful_shutdown_wait_loop_s": 0.2}

logger = logging.getLogger(__name__)


def serve(loaded: Loaded, store: Store, ask: list[str], once: bool, address: str | None = None) -> int:
    """Serves the bundle until Ctrl-C, or with `once` until `ask` is answered. Returns the exit code.

    address: of a Ray cluster; None: a Ray of this machine is started, and ended with the service.
    Raises BrokenArtifactError or StoreError; KeyboardInterrupt if Ctrl-C comes before the service is up.
    """
    out, capacity = sys.stdout, loaded.profile.serve
    try:
        bundle = find_bundle(loaded, store)
        check_port(capacity.host, capacity.port)
        with _ray(capacity, address), deployed(bundle, capacity) as url, Client(url) as client:
            out.write(f"{bundle.card.id} is up at {url} - the chat page; Ctrl-C ends it\n")
            for question in ask:
                _answer(client, bundle.card.id, question, out)
            out.write(f"\nAsk it yourself:\n{example(url, bundle.card.id)}\n")
            out.flush()
            if not once:
                _until_interrupted()
                out.write("\nended\n")
    except (RefusedError, ServiceError) as error:
        sys.stderr.write(f"{error}\n")
        return error.code if isinstance(error, RefusedError) else 1
    return 0


def example(url: str, model: str) -> str:
    """A command that asks the service."""
    return (
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )


def check_port(host: str, port: int) -> None:
    """Raises RefusedError if nobody can listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        why = {
            errno.EADDRINUSE: "is in use by another program; end that, or choose another port",
            errno.EACCES: "may not be used by this user; choose a port above 1023",
        }.get(error.errno or 0, f"cannot be used ({error.strerror or error}); choose another host or port")
        other = port + 1 if 1023 < port < 65_535 else 8000
        raise RefusedError(1, f"port {port} of {host} {why}: --set serve.port={other}") from error


@contextmanager
def deployed(bundle: Bundle, capacity: Capacity) -> Iterator[str]:
    """The service on the Ray this process is connected to; yields its address once a replica has answered.

    Raises RefusedError if it does not come up.
    """
    from ray import serve as ray_serve  # Ray is imported once it is known that there is something to serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray_serve.start(http_options=HTTPOptions(host=capacity.host, port=capacity.port), logging_config=quiet)
        try:
            ray_serve.run(_application(bundle, capacity, quiet), name=APP, route_prefix="/")
        except RuntimeError as error:
            raise RefusedError(1, f"the service did not come up: {_why(error)}") from error
        url = f"http://{_reachable(capacity.host)}:{capacity.port}"
        _wait_until_healthy(url)
        yield url
    finally:
        with _hushed():
            ray_serve.shutdown()


def _application(bundle: Bundle, capacity: Capacity, logs: Any) -> Any:
    from ray.serve import deployment

    from pipelines.service.gateway import Gateway
    from pipelines.service.replica import Replica

    fewest, most = capacity.replicas
    actor: dict[str, Any] = {"num_cpus": capacity.cpus}
    if capacity.gpu is not None:
        actor |= {"num_gpus": 1, "accelerator_type": capacity.gpu}
    waiting = 4 * capacity.max_batch
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_constructor_retry_count": 1,
        "health_check_period_s": 2,  # a replica that is gone is missed after this long
        "max_ongoing_requests": waiting,  # the engine queues what does not run yet
        "max_queued_requests": waiting,  # in the gateway, when all replicas are full; then it is 429
        **DRAIN,
        "logging_config": logs,
    }
    if fewest == most:
        options["num_replicas"] = most
    else:
        wanted = {"target_ongoing_requests": capacity.target_ongoing}
        options["autoscaling_config"] = {"min_replicas": fewest, "max_replicas": most, **wanted}
    replica = deployment(Replica).options(**options).bind(bundle.files, bundle.dtype, capacity)
    gateway = deployment(Gateway).options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000,
        **DRAIN,
        logging_config=logs,
    )
    return gateway.bind(replica, bundle.files, bundle.card)


@contextmanager
def _ray(capacity: Capacity, address: str | None) -> Iterator[None]:
    """The cluster at `address`, or a Ray of this machine that ends with the block."""
    cpus = max(os.cpu_count() or 1, capacity.replicas[1] * capacity.cpus)
    stack = ExitStack()
    stack.enter_context(ray_running(address, cpus, dashboard=False))
    try:
        yield
    finally:
        with _hushed():
            stack.close()


@contextmanager
def _hushed() -> Iterator[None]:
    """Keeps what Ray prints when its actors are told to end ("graceful_shutdown failed") off the user's screen."""
    said = io.StringIO()
    with redirect_stdout(said):
        yield
    logger.debug("Ray said at its end: %s", said.getvalue())


def _wait_until_healthy(url: str) -> None:
    end = time.monotonic() + UP_TIMEOUT_S
    with Client(url) as client:
        while not client.healthy():
            if time.monotonic() > end:
                raise RefusedError(1, f"the service did not answer at {url}/health within {UP_TIMEOUT_S} s")
            time.sleep(0.1)


def _answer(client: Client, model: str, question: str, out: TextIO) -> None:
    """Prints a question and its answer as it comes."""
    out.write(f"\n> {question}\n")
    out.flush()
    began = time.monotonic()
    for piece in client.ask(model, [{"role": "user", "content": question}]):
        if isinstance(piece, End):
            speed = piece.reply_tokens / (time.monotonic() - began)
            out.write(f"\n  ({piece.reply_tokens} tokens, {speed:.0f} tokens/s)\n")
        else:
            out.write(piece)
        out.flush()


def _until_interrupted() -> None:
    """Waits for Ctrl-C or SIGTERM."""
    done = threading.Event()

    def end(signum: int, frame: FrameType | None) -> None:
        done.set()

    before = [(number, signal.signal(number, end)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        done.wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _reachable(host: str) -> str:
    """An address to ask at, for a host to listen on."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _why(error: RuntimeError) -> str:
    """The last line that the deployment which failed has said; Serve's own error only names it."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(APP)
    said = str(error)
    for deployment in application.deployments.values() if application else []:
        if deployment.status.name.endswith(("FAILED", "UNHEALTHY")):
            said = deployment.message
    return said.strip().splitlines()[-1].strip()
