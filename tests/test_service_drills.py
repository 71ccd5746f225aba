"""What users and machines do to a service of two replicas: kill its processes, flood it, leave it, send it garbage.

Each drill ends with a service that answers as if nothing had happened. The numbers are the goals of issue 4.
"""

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.program import Program, family, started
from tests.serving import spoken

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.usefixtures("whole")]

HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
)
BACK_S = 30  # within which a killed process is replaced on a busy machine
BODY: dict[str, Any] = {"model": "tiny-base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with started(tmp_path_factory.mktemp("drills"), replicas=2) as program:
        program.wait("RAY_ADDRESS")
        yield program


@pytest.fixture
def whole(program: Program) -> Iterator[None]:
    """Before and after each drill both replicas answer, and nothing runs or waits."""
    wait_until_whole(program)
    yield
    wait_until_whole(program)


def wait_until_whole(program: Program) -> None:
    end = time.monotonic() + BACK_S
    while (found := gauges(program)) != [0.0] * 6:
        assert time.monotonic() < end, f"running, waiting and cache of two replicas: {found}"
        time.sleep(0.2)


def gauges(program: Program) -> list[float]:
    try:
        text = httpx.get(f"{program.url}/metrics", timeout=10).text
    except httpx.HTTPError:
        return []
    names = "num_requests_running|num_requests_waiting|kv_cache_usage_perc"
    return [float(value) for value in re.findall(rf"^vllm:(?:{names}){{.*}} (\S+)$", text, re.MULTILINE)]


def processes(program: Program, name: str) -> list[int]:
    return [pid for pid, said in family(program.process.pid).items() if said.startswith(f"ray::{name}")]


@asynccontextmanager
async def many(program: Program) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(base_url=program.url, timeout=120, limits=limits) as client:
        yield client


async def ask(client: httpx.AsyncClient, **other: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={**BODY, **other})


def answers(program: Program, count: int, **other: Any) -> list[httpx.Response]:
    async def all_at_once() -> list[httpx.Response]:
        async with many(program) as client:
            return await asyncio.gather(*(ask(client, **other) for _ in range(count)))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_is_killed_under_load(program: Program, stream: bool) -> None:
    def said(answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        return spoken(answer.text) if stream else str(answer.json()["choices"][0]["message"]["content"])

    async def ask_and_kill() -> tuple[list[str], set[str]]:
        async with many(program) as client:
            alone = [said(await ask(client, stream=stream, seed=seed)) for seed in range(8)]
            asking = [asyncio.create_task(ask(client, stream=stream, seed=n % 8)) for n in range(40)]
            await asyncio.sleep(0.1)
            os.kill(processes(program, "ServeReplica:nanochat:Replica-")[0], signal.SIGKILL)
            answered = await asyncio.gather(*asking)
            wrong = {said(answer) for n, answer in enumerate(answered) if said(answer) != alone[n % 8]}
            return alone, wrong

    alone, wrong = asyncio.run(ask_and_kill())
    assert len(set(alone)) > 1
    assert not wrong


def test_the_controller_is_killed(program: Program) -> None:
    [controller] = processes(program, "ServeController")
    os.kill(controller, signal.SIGKILL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        assert answers(program, 4)[0].status_code == 200
    assert processes(program, "ServeController") not in ([], [controller])


def test_a_flood_is_answered_or_told_when_to_come_back(program: Program) -> None:
    kinds = {answer.status_code for answer in answers(program, 400)}
    assert 200 in kinds
    assert kinds <= {200, 429}


def test_the_cache_is_too_small_for_all(program: Program) -> None:
    prompt = [{"role": "user", "content": "x" * 60}]  # 66 tokens with its frame, and 60 to come; the cache holds 512
    found = answers(program, 40, messages=prompt)
    assert {answer.status_code for answer in found} <= {200, 429}
    assert sum(answer.status_code == 200 for answer in found) >= 8


def test_clients_leave(program: Program) -> None:
    async def ask_and_leave() -> None:
        async with many(program) as client:
            for _ in range(50):
                async with client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
                    await anext(answer.aiter_text())

    asyncio.run(ask_and_leave())  # `whole` sees that nothing runs on


def test_stalled_bodies_are_shown_the_door(program: Program) -> None:
    head = HEAD.format(size=99).encode() + b"{"
    port = httpx.URL(program.url).port
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(50)]
    began = time.monotonic()
    for connection in stalled:
        connection.sendall(head)
    assert answers(program, 1)[0].status_code == 200
    assert time.monotonic() - began < 5, "they keep others waiting"
    for connection in stalled:
        with closing(connection):
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 15


def test_a_reader_that_does_not_read_costs_no_memory(program: Program) -> None:
    long = {**BODY, "stream": True, "n": 16, "logprobs": True, "top_logprobs": 20, "max_tokens": 100}
    body = json.dumps(long).encode()
    [gateway] = processes(program, "ServeReplica:nanochat:Gateway")
    before = memory(gateway)
    readers = []
    for _ in range(10):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", httpx.URL(program.url).port))
        connection.sendall(HEAD.format(size=len(body)).encode() + body)
        readers.append(connection)
    most = 0
    for _ in range(50):
        time.sleep(0.1)
        most = max(most, memory(gateway))
    assert answers(program, 1)[0].status_code == 200
    for connection in readers:
        connection.close()
    assert most - before < 10 * (2 << 20), "2 MiB a stream at most, what Python keeps for itself included"


def memory(pid: int) -> int:
    """Bytes."""
    return int(psutil.Process(pid).memory_info().rss)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"model": ', 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b"[" * 200_000, 400),
        (b"x" * (64 << 20), 413),
        (b'{"model": "tiny-base", "messages": [{"role": "user", "content": "' + b"x" * 500_000 + b'"}]}', 400),
    ],
    ids=["malformed", "bad UTF-8", "deep", "64 MiB", "longer than the context"],
)
def test_garbage_is_refused_and_costs_no_memory(program: Program, content: bytes, status: int) -> None:
    [gateway] = processes(program, "ServeReplica:nanochat:Gateway")
    before = memory(gateway)
    try:
        answer = httpx.post(f"{program.url}/v1/chat/completions", content=content, timeout=20)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    except httpx.WriteError:
        assert status == 413, "the connection was closed on a body that is allowed"
    assert memory(gateway) - before < 20 << 20


def test_nothing_was_said_to_the_user_but_ours(program: Program, tmp_path: Path) -> None:
    for line in "".join(program.lines).splitlines():
        assert "Traceback" not in line
