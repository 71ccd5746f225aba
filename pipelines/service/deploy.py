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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TextIO

import httpx

from pipelines.artifacts import Store
from pipelines.load import Loaded
from pipelines.ray_local import ray_running
from pipelines.service.bundle import Bundle, RefusedError, find_bundle
from pipelines.service.client import Client, End, ServiceError
from pipelines.service.keys import KeyFileError, Keys, open_to_others, read_keys
from pipelines.spec import Capacity

UP_TIMEOUT_S = 120

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What the user wants of the service."""

    ask: Sequence[str] = ()  # once it is up
    once: bool = False  # end when the questions are answered
    rollback: bool = False  # to the bundle before the last rollout
    stop: bool = False  # take it down


def serve(loaded: Loaded, store: Store, wish: Wish, address: str | None = None, key: str | None = None) -> int:
    """Serves the bundle. Returns the exit code.

    key: with which the questions are asked, where the service wants one.

    address: of the Ray it runs on, where it stays up, and where another bundle takes the place of one that is up.
    None: a Ray of this machine is started, and ended with the service: at Ctrl-C, or with `once` after the questions.
    Raises BrokenArtifactError or StoreError; KeyboardInterrupt if Ctrl-C comes before the service is up.
    """
    try:
        if address is None:
            _serve_here(loaded, store, wish, key)
        else:
            _serve_there(loaded, store, wish, address, key)
    except (RefusedError, ServiceError) as error:
        sys.stderr.write(f"{error}\n")
        return error.code if isinstance(error, RefusedError) else 1
    return 0


def _serve_here(loaded: Loaded, store: Store, wish: Wish, key: str | None) -> None:
    if wish.rollback or wish.stop:
        word = "--rollback" if wish.rollback else "--stop"
        said = f"{word} is for a service that is up: say on which Ray, as in RAY_ADDRESS=auto nanochat serve ... {word}"
        raise RefusedError(2, said)
    capacity = loaded.profile.serve
    bundle = find_bundle(loaded, store)
    keys = _keys(loaded)
    check_port(capacity.host, capacity.port)
    with _ray(capacity, None) as ray_address, deployed(bundle, capacity, keys) as url, Client(url, key) as client:
        sys.stdout.write(f"{bundle.card.id} is up at {url} - the chat page; Ctrl-C ends it\n")
        _answer_all(client, bundle.card.id, wish.ask, keyed=keys is not None)
        if not wish.once:
            sys.stdout.write(f"\nPut another bundle in its place:\nRAY_ADDRESS={ray_address} nanochat serve ...\n")
            sys.stdout.flush()
            _until_interrupted()
            sys.stdout.write("\nended\n")


def _serve_there(loaded: Loaded, store: Store, wish: Wish, address: str, key: str | None) -> None:
    capacity = loaded.profile.serve
    bundle = None if wish.rollback or wish.stop else find_bundle(loaded, store)
    keys = _keys(loaded)
    with _ray(capacity, address):
        from pipelines.service import rollout

        if wish.stop:
            rollout.end()
            sys.stdout.write("ended\n")
            return
        bundle = bundle or rollout.bundle_before(store)
        done = rollout.roll_out(bundle, capacity, keys)
        url = _address(capacity.host, capacity.port)
        with Client(url, key) as client:
            _wait_until_healthy(client)
            sys.stdout.write(f"{bundle.card.id} ({bundle.files.address}) {done} at {url}; --stop ends it\n")
            _answer_all(client, bundle.card.id, wish.ask, keyed=keys is not None)
        if wish.once and done == "is up":
            rollout.end()


def _keys(loaded: Loaded) -> Keys | None:
    """Who may ask. Raises RefusedError if their file cannot be used."""
    name = loaded.profile.serve.keys
    if name is None:
        return None
    path = loaded.base / name
    try:
        keys = read_keys(path)
    except KeyFileError as error:
        raise RefusedError(2, str(error)) from error
    if warning := open_to_others(path):
        sys.stderr.write(f"{warning}\n")
    return keys


def example(url: str, model: str, *, keyed: bool = False) -> str:
    """A command that asks the service."""
    key = ' -H "Authorization: Bearer $NANOCHAT_API_KEY"' if keyed else ""
    return (
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f'  -d \'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )


def check_port(host: str, port: int) -> None:
    """Raises RefusedError if nobody can listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        why = {
            errno.EADDRINUSE: _who_uses(host, port),
            errno.EACCES: "may not be used by this user; choose a port above 1023",
        }.get(error.errno or 0, f"cannot be used ({error.strerror or error}); choose another host or port")
        other = port + 1 if 1023 < port < 65_535 else 8000
        raise RefusedError(1, f"port {port} of {host} {why}: --set serve.port={other}") from error


def _who_uses(host: str, port: int) -> str:
    with suppress(httpx.HTTPError, ValueError, KeyError, IndexError):
        up = httpx.get(f"{_address(host, port)}/v1/models", timeout=2).json()["data"][0]["id"]
        return f"is where {up!r} is up; RAY_ADDRESS=auto puts this bundle in its place; or choose another port"
    return "is in use by another program; end that, or choose another port"


@contextmanager
def deployed(bundle: Bundle, capacity: Capacity, keys: Keys | None = None) -> Iterator[str]:
    """The service on the Ray this process is connected to; yields its address once a replica has answered.

    keys: who may ask; None: everybody.

    Raises RefusedError if it does not come up.
    """
    from pipelines.service import rollout  # Ray is imported once it is known that there is something to serve

    try:
        rollout.roll_out(bundle, capacity, keys)
        with Client(_address(capacity.host, capacity.port)) as client:
            _wait_until_healthy(client)
        yield _address(capacity.host, capacity.port)
    finally:
        with _hushed():
            rollout.end()


@contextmanager
def _ray(capacity: Capacity, address: str | None) -> Iterator[str]:
    """The cluster at `address`, or a Ray of this machine that ends with the block; yields its address."""
    # Twice the replicas: a rollout runs two bundles for a moment.
    cpus = max(os.cpu_count() or 1, 2 * capacity.replicas[1] * capacity.cpus)
    with ray_running(address, cpus) as found:
        yield found


@contextmanager
def _hushed() -> Iterator[None]:
    """Keeps what Ray prints when its actors are told to end ("graceful_shutdown failed") off the user's screen."""
    said = io.StringIO()
    with redirect_stdout(said):
        yield
    logger.debug("Ray said at its end: %s", said.getvalue())


def _wait_until_healthy(client: Client) -> None:
    end = time.monotonic() + UP_TIMEOUT_S
    while not client.healthy():
        if time.monotonic() > end:
            raise RefusedError(1, f"the service did not answer at {client.url}/health within {UP_TIMEOUT_S} s")
        time.sleep(0.1)


def _answer_all(client: Client, model: str, questions: Sequence[str], *, keyed: bool) -> None:
    for question in questions:
        _answer(client, model, question, sys.stdout)
    sys.stdout.write(f"\nAsk it yourself:\n{example(client.url, model, keyed=keyed)}\n")
    sys.stdout.flush()


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


def _address(host: str, port: int) -> str:
    """Where to ask, for a host to listen on."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"
