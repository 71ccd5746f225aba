"""Calls through a real Ray Serve app: each to the replica that it is for, and nothing waits for one that is lost."""

import os
import subprocess
import sys

import pytest

SERVE = """
import asyncio, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from ray import serve
from ray.serve.config import RequestRouterConfig
from nanochat.engine.sampler import SampleParams
from pipelines.ray_local import ray_running
from pipelines.service.calls import Request
from pipelines.service.prefixes import ledger_of
from pipelines.service.protocol import ReplicaLostError

class Toy:
    def __init__(self):
        self.me = serve.get_replica_context().replica_id.unique_id

    async def submit(self, replica, client, request, refused):
        return self.me

    async def where(self, replica):
        return self.me, os.getpid()

    async def stream(self, replica, seconds):
        yield self.me
        await asyncio.sleep(seconds)
        yield self.me

def toys(replicas, most=1_000_000):
    router = RequestRouterConfig(
        request_router_class="pipelines.service.routing:PrefixRouter", request_router_kwargs={"kv_tokens": 16_384}
    )
    return serve.deployment(Toy).options(
        num_replicas=replicas, max_ongoing_requests=most, request_router_config=router,
        ray_actor_options={"num_cpus": 0}, health_check_period_s=2, health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1, graceful_shutdown_timeout_s=20,
    ).bind()

began = time.monotonic()
def say(what):
    print(f"{time.monotonic() - began:.1f} s: {what}", flush=True)

def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)

with ray_running(None, 4):
    serve.start(proxy_location="Disabled")
    handle = serve.run(toys(3), name="app", route_prefix=None)
    say("up")
    ledger = ledger_of("app", "Toy")
    number = 0

    def submit(tokens, refused=frozenset(), to=""):
        global number
        number += 1
        ledger.began(("me", number))
        request = Request(number, tokens, SampleParams(10))
        return handle.submit.remote(to, "me", request, refused).result(timeout_s=10)

    first = submit([1] * 200)
    until(lambda: len(ledger.loads()) == 3)
    a, b, c = ledger.loads()
    pids = {}
    for name in (a, b, c) * 5:
        there, pids[name] = handle.where.remote(name).result(timeout_s=10)
        assert there == name, "a call did not go where it was told"
    assert handle.where.remote("").result(timeout_s=10)[0] in pids

    chats = {turn: [turn] * 300 for turn in range(6)}
    home = {turn: submit(tokens) for turn, tokens in chats.items()}
    assert set(home.values()) == {a, b, c}, "six chats at once are not shared out"
    for done in range(1, number + 1):
        ledger.ended(("me", done))
    assert set(ledger.loads().values()) == {0}, ledger.loads()
    for _ in range(3):
        for turn in chats:
            chats[turn] += [turn + 100] * 50
            assert submit(chats[turn]) == home[turn], "a chat has moved"
            ledger.ended(("me", number))
    assert submit(chats[0], refused=frozenset({home[0]})) != home[0]
    assert submit(chats[0], refused=frozenset({a, b, c})) in (a, b, c)
    assert [submit(chats[0], to=name) for name in (c, b, a)] == [c, b, a]
    assert submit(chats[0], to="gone") == home[0]
    say("routed")

    os.kill(pids[c], signal.SIGSTOP)  # does not answer, and nobody knows yet
    stuck = [handle.where.remote(c) for _ in range(20)]
    asked = time.monotonic()
    for _ in range(10):
        assert handle.where.remote(a).result(timeout_s=10)[0] == a
    assert time.monotonic() - asked < 5, "calls wait for a replica that they are not for"
    os.kill(pids[c], signal.SIGCONT)
    assert {answer.result(timeout_s=10)[0] for answer in stuck} == {c}
    say("one was stopped for a while")

    chat = next(turn for turn, name in home.items() if name == b)
    os.kill(pids[b], signal.SIGKILL)
    asked = time.monotonic()
    assert handle.where.remote(b).result(timeout_s=10)[0] in (a, c), "a call for one that is gone goes to another"
    assert submit(chats[chat]) in (a, c)
    assert time.monotonic() - asked < 5, "a lost replica is waited for"
    until(lambda: len(ledger.loads()) == 3 and not ledger.serves(b))  # Serve has started another
    say("one was lost")

    names = list(ledger.loads())
    streams = [iter(handle.options(stream=True).stream.remote(name, 4)) for name in names]
    assert [next(stream) for stream in streams] == names
    with ThreadPoolExecutor(1) as other:
        less = other.submit(serve.run, toys(1), name="app", route_prefix=None)
        until(lambda: len(ledger.loads()) == 1)
        for name in names:
            assert handle.where.remote(name).result(timeout_s=10)[0] == name, "one that drains is not told what to end"
            assert submit([5] * 50) in ledger.loads()
        assert [next(stream) for stream in streams] == names
        less.result()
    say("two have left")
    serve.delete("app")

    handle = serve.run(toys(2, 1), name="strict", route_prefix=None)
    handle.where.remote("").result(timeout_s=10)
    ledger = ledger_of("strict", "Toy")
    until(lambda: len(ledger.loads()) == 2)
    pids = dict(handle.where.remote(name).result(timeout_s=10) for name in ledger.loads())
    x, y = pids
    stream = iter(handle.options(stream=True).stream.remote(x, 5))
    assert next(stream) == x
    asked = time.monotonic()
    assert handle.where.remote(x).result(timeout_s=10)[0] == y, "a call that is turned away tries another"
    assert time.monotonic() - asked < 3, "a busy replica is waited for"
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    asked = time.monotonic()
    try:
        handle.where.remote(x).result(timeout_s=10)
        raise AssertionError("somebody answered")
    except ReplicaLostError as error:
        say(f"nobody is there: {error}")
    assert time.monotonic() - asked < 3, "a new replica is waited for"
    serve.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_calls_through_ray_serve_go_where_they_should() -> None:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", SERVE], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
