"""A bundle takes the place of another under load, or fails to; the last one comes back. By commands a user types."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from pipelines.plan import plan
from tests.program import SERVE, Program, family, started
from tests.served import build, write_file
from tests.serving import spoken, sse

pytestmark = [pytest.mark.ray, pytest.mark.drill]


def nanochat_serve(program: Program, folder: Path, *options: str) -> tuple[int, str]:
    """The exit code and what was printed. Serve warns of each answer that it waits for, as on a busy machine."""
    [address] = set(re.findall(r"RAY_ADDRESS=(\S+)", "".join(program.lines)))
    command = [sys.executable, *SERVE, str(folder / "tiny.yaml"), "--profile", "here", *options]
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "0.0001"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stdout + done.stderr


def another_bundle(program: Program, folder: Path, tokens: int, scale: float) -> str:
    """Builds it and makes the pipeline file ask for it; returns its address."""
    loaded = write_file(folder, httpx.URL(program.url).port or 0, tokens=tokens)
    build(loaded, scale=scale)
    return next(step.address for step in plan(loaded) if step.name == "bundle")


def up(program: Program) -> str:
    """The address of the bundle that answers."""
    return str(httpx.get(f"{program.url}/v1/models").json()["data"][0]["lineage"]["address"])


@contextmanager
def load(program: Program) -> Iterator[list[str]]:
    """Four clients that ask for streams one after the other; how each answer ended."""
    ends: list[str] = []
    over = threading.Event()
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "Hi"}], "stream": True}

    def ask() -> None:
        while not over.is_set():
            try:
                answer = httpx.post(f"{program.url}/v1/chat/completions", json=body, timeout=60)
                ends.append(sse(answer.text)[-1] if answer.status_code == 200 else answer.text)
            except httpx.HTTPError as error:
                ends.append(repr(error))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        yield ends
    finally:
        over.set()
        for client in clients:
            client.join()


def test_bundles_come_go_and_come_back_without_a_failed_request(tmp_path: Path) -> None:
    with started(tmp_path) as program:
        program.wait("RAY_ADDRESS")
        first = up(program)
        second = another_bundle(program, tmp_path, 2560, scale=-1.0)
        assert second != first

        with load(program) as ends:
            code, said = nanochat_serve(program, tmp_path)
        assert (code, up(program)) == (0, second), said
        assert f"tiny-base ({second}) has replaced {first} at {program.url}" in said
        assert set(ends) == {"[DONE]"}
        assert len(ends) > 20

        another_bundle(program, tmp_path, 3840, scale=float("nan"))
        with load(program) as ends:
            code, said = nanochat_serve(program, tmp_path)
        assert (code, up(program)) == (1, second), said
        assert said.startswith("the service did not come up: RuntimeError: the model's logits are not finite")
        assert set(ends) == {"[DONE]"}

        with load(program) as ends:
            code, said = nanochat_serve(program, tmp_path, "--rollback")
        assert (code, up(program)) == (0, first), said
        assert set(ends) == {"[DONE]"}

        write_file(tmp_path, httpx.URL(program.url).port or 0)
        code, said = nanochat_serve(program, tmp_path)
        assert (code, f"{first}) was up already" in said) == (0, True), said

        assert nanochat_serve(program, tmp_path, "--stop") == (0, "ended\n")
        with pytest.raises(httpx.ConnectError):
            up(program)
        code, said = nanochat_serve(program, tmp_path, "--rollback")
        assert (code, said) == (1, "no service is up here, so there is nothing to roll back\n")


def test_a_reply_that_takes_longer_than_the_rollout_ends_where_it_began(tmp_path: Path) -> None:
    with started(tmp_path, depth=12) as program:  # deep, so that it still speaks when its first words are read
        program.wait("RAY_ADDRESS")
        body = {"model": "tiny-base", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "seed": 1}
        url = f"{program.url}/v1/chat/completions"
        alone = spoken(httpx.post(url, json=body, timeout=60).text)
        loaded = write_file(tmp_path, httpx.URL(program.url).port or 0, tokens=2560, depth=12)
        build(loaded, scale=-1.0, depth=12)
        [old] = [pid for pid, name in family(program.process.pid).items() if ":nanochat:Replica-1" in name]
        rollout = threading.Thread(target=nanochat_serve, args=(program, tmp_path))
        first = up(program)
        with httpx.stream("POST", url, json=body, timeout=120) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            os.kill(old, signal.SIGSTOP)
            rollout.start()
            while up(program) == first:
                time.sleep(0.2)
            time.sleep(8)  # longer than a gateway has at its end
            os.kill(old, signal.SIGCONT)
            text += "".join(pieces)
        rollout.join()
        assert spoken(text) == alone
        assert spoken(httpx.post(url, json=body, timeout=60).text) != alone, "the new bundle says the same"
