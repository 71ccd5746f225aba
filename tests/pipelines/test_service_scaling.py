"""How many replicas there are, in a simulated service and through a real Ray Serve app."""

import os
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.engine.engine import Engine
from nanochat.engine.sampler import SampleParams
from pipelines.service.scaling import NAMES, TIMES, Policy, Reading, readings, report, wanted
from tests.serving import tiny_runner

IDLE = Reading(0.0, 0.0, 0.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0)
BOUNDS = (1, 4)


def steady(seconds: int = 15, speed: float = 1000.0, **values: float) -> list[Reading]:
    """A replica that says the same every second, and computes."""
    return [replace(IDLE, time=t, tokens_computed=t * speed, **values) for t in range(seconds)]


def grows(readings: Sequence[Reading], **a_second: float) -> list[Reading]:
    """With counts that grow."""
    return [replace(one, **{name: one.time * more for name, more in a_second.items()}) for one in readings]


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({}, 1),  # 2 -> 1: idle
        ({"running": 1.2}, 1),  # together 2.4 + 2 * 1.55 = 5.5 of 0.7 * 8 slots
        ({"running": 1.25}, 2),
        ({"running": 5.0}, 2),
        ({"running": 8.0}, 2),  # full, but nobody waits
        ({"running": 8.0, "waiting": 1.0}, 3),
        ({"running": 5.0, "tokens_waiting": 499.0}, 2),  # at 1,000 tokens/s
        ({"running": 5.0, "tokens_waiting": 501.0}, 3),
        ({"running": 5.0, "tokens_waiting": 15_001.0}, 5),  # 30 s of work, to be done in 10
        ({"running": 5.0, "kv_usage": 0.84}, 2),
        ({"running": 5.0, "kv_usage": 0.86}, 3),
        ({"running": 1.0, "kv_usage": 0.29}, 1),  # 0.58 of one cache, of 0.7 * 0.85
        ({"running": 1.0, "kv_usage": 0.30}, 2),
    ],
)
def test_two_replicas_that_say_the_same(values: dict[str, float], want: int) -> None:
    assert wanted([[replace(one, **values) for one in steady()]] * 2, 2, (1, 8)) == want


def test_requests_without_a_place_ask_for_as_much_more() -> None:
    full = steady(running=8.0)
    assert wanted([grows(full, admitted=10, refused=10)] * 2, 2, (1, 8)) == 3  # 20 have a place, 10 have none
    assert wanted([grows(full, admitted=5, refused=40)] * 2, 2, (1, 20)) == 10  # 10 have, 40 have none: fivefold
    assert wanted([grows(full, admitted=10, refused=10), grows(full, admitted=10)], 2, (1, 8)) == 2  # they were taken
    assert wanted([grows(full, refused=1)] * 2, 2, (1, 8)) == 4  # nobody has a place
    once = [*full[:-1], replace(full[-1], refused=50.0)]
    assert wanted([once] * 2, 2, (1, 8)) == 2
    calm = steady()
    assert wanted([calm, [*calm[:-1], replace(calm[-1], refused=1.0)]], 2, (1, 8)) == 2  # nor is one taken then


def test_bounds_and_what_is_on_its_way() -> None:
    busy, idle = steady(running=8.0, waiting=5.0), steady()
    assert wanted([busy] * 4, 4, BOUNDS) == 4
    assert wanted([idle], 1, BOUNDS) == 1
    assert wanted([busy], 2, BOUNDS) == 2  # the second is starting
    assert wanted([busy, []], 2, BOUNDS) == 2  # and has not said anything
    assert wanted([idle], 2, BOUNDS) == 2  # nor is it stopped before
    assert wanted([], 2, BOUNDS) == 2
    assert wanted([], 0, BOUNDS) == 1
    assert wanted([idle] * 3, 2, BOUNDS) == 2  # one is leaving


def test_a_moment_is_not_enough() -> None:
    calm = steady(running=5.0)
    burst = [*calm[:-1], replace(calm[-1], running=8.0, waiting=9.0, tokens_waiting=9_000.0, kv_usage=1.0)]
    assert wanted([burst, burst], 2, BOUNDS) == 2
    lull = [*calm[:-1], replace(calm[-1], running=0.0)]
    assert wanted([lull, lull], 2, BOUNDS) == 2


def test_a_report_is_what_the_engine_says() -> None:
    engine = Engine(tiny_runner(), max_batch=2)
    for _ in range(3):
        engine.add([256, *b"Hello", 258], SampleParams(8, temperature=0.0, stop=(260,)))
    engine.step()
    said = report(engine.stats(), slots=2, tokens_waiting=7, admitted=3, refused=1)
    assert set(said) == set(NAMES)
    assert (said["running"], said["waiting"], said["slots"]) == (2, 1, 2)
    assert (said["tokens_waiting"], said["admitted"], said["refused"]) == (7, 3, 1)
    assert said["tokens_computed"] > 0 < said["kv_usage"]
    assert all(isinstance(value, int | float) for value in said.values())  # Serve refuses all if one is not


@dataclass
class Point:
    timestamp: float
    value: float


def test_the_policy_reads_serves_time_series() -> None:
    busy = steady(running=8.0, waiting=5.0)
    metrics = {name: {"r": [Point(one.time, getattr(one, name)) for one in busy]} for name in NAMES}
    metrics["running_requests"] = {"r": [Point(0.0, 99.0)]}  # Serve's own
    assert readings(metrics, "r") == busy
    assert readings(metrics, "unheard") == []
    assert readings({}, "r") == []

    @dataclass
    class Context:
        raw_metrics: Any
        running_replicas: Any
        target_num_replicas: int = 1
        capacity_adjusted_min_replicas: int = 1
        capacity_adjusted_max_replicas: int = 4

    assert Policy()(Context(metrics, ["r"])) == (2, {})
    assert Policy(goal_s=1e9)(Context(metrics, ["r"])) == (2, {})  # the slots are full
    assert Policy()(Context({}, ["r"])) == (1, {})


# A service: times of depth 12 on two cores (8.5 ms a step and 0.47 for each token in it), at most 8 replies at a time.


@dataclass
class Asked:
    prompt: int
    reply: int
    came: float
    first: float | None = None


@dataclass
class SimReplica:
    up: float  # when it has started
    waiting: deque[Asked] = field(default_factory=deque)
    running: list[Asked] = field(default_factory=list)
    free: float = 0.0  # when its step ends
    said: deque[Reading] = field(default_factory=lambda: deque(maxlen=int(TIMES["look_back_period_s"])))
    computed: int = 0
    admitted: int = 0
    refused: int = 0
    leaving: bool = False

    def step(self, now: float) -> None:
        """Until `now`."""
        while self.free <= now and (self.waiting or self.running):
            while self.waiting and len(self.running) < 8:
                self.running.append(self.waiting.popleft())
            parts, room = [], 512
            for one in self.running:
                parts.append((one, min(max(one.prompt, 1), room)))
                room -= parts[-1][1]
            self.computed += 512 - room
            self.free += 0.0085 + 0.00047 * (512 - room)
            for one, part in parts:
                one.prompt -= min(part, one.prompt)
                if one.prompt or not part:
                    continue
                one.reply -= 1
                if one.first is None:
                    one.first = self.free
                if not one.reply:
                    self.running.remove(one)
        self.free = max(self.free, now)

    def offer(self, asked: Asked) -> bool:
        """As a replica: takes what it can begin within two seconds or so."""
        if sum(one.prompt for one in self.waiting) > 4_000:
            self.refused += 1
            return False
        self.admitted += 1
        self.waiting.append(asked)
        return True


@dataclass
class Outcome:
    counts: list[int]  # replicas that run, every second
    waits: list[tuple[float, float]]  # when a request came, and seconds to its first token
    refused: list[float]  # when

    def changes(self, begin: int = 0) -> int:
        return sum(a != b for a, b in zip(self.counts[begin:], self.counts[begin + 1 :], strict=False))

    def p99(self, begin: float, end: float) -> float:
        return float(np.quantile([wait for came, wait in self.waits if begin <= came < end], 0.99))


ONE = 4.0  # requests a second that one replica can serve: prompts of 200 and replies of 100 tokens on average
START = 8


def simulate(load: Callable[[float], float], seconds: int, bounds: tuple[int, int] = (1, 3), seed: int = 0) -> Outcome:
    """load: what is asked at a time, in shares of what one replica can serve. Delays as Serve's."""
    rng = random.Random(seed)
    target, since = bounds[0], {1: 0, -1: 0}
    replicas = [SimReplica(0.0) for _ in range(target)]
    outcome, everything = Outcome([], [], []), list[Asked]()
    for tick in range(seconds * 10):
        now = tick / 10
        up = [replica for replica in replicas if replica.up <= now and not replica.leaving]
        for _ in range(np.random.default_rng(seed * 100_003 + tick).poisson(load(now) * ONE / 10)):
            asked = Asked(rng.randint(50, 350), rng.randint(20, 180), now)
            order = sorted(up, key=lambda replica: len(replica.waiting) + len(replica.running))
            if any(replica.offer(asked) for replica in order):
                everything.append(asked)
            else:
                outcome.refused.append(now)
        for replica in replicas:
            replica.step(now + 0.1)
        if tick % 10:
            continue
        for one in up:
            prompts = sum(asked.prompt for asked in one.waiting)
            sizes = (prompts, one.computed, len(one.running), len(one.waiting), 8, len(one.running) / 40)
            one.said.append(Reading(now, *sizes, one.admitted, one.refused))
        want = wanted([list(replica.said) for replica in up], target, bounds)
        for sign, delay in ((1, TIMES["upscale_delay_s"]), (-1, TIMES["downscale_delay_s"])):
            since[sign] = since[sign] + 1 if (want - target) * sign > 0 else 0
            if since[sign] > delay:
                replicas += [SimReplica(now + START, free=now + START) for _ in range(want - target)]
                for leaver in up[want:]:
                    leaver.leaving = True
                target, since[sign] = want, 0
        outcome.counts.append(len(up))
    outcome.waits = [(asked.came, asked.first - asked.came) for asked in everything if asked.first is not None]
    return outcome


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_second_replica_comes_for_70_percent_of_two_and_goes_again(seed: int) -> None:
    def load(time: float) -> float:
        return 1.4 if 60 <= time < 240 else 0.1

    outcome, always = (simulate(load, 400, (fewest, 2), seed) for fewest in (1, 2))
    assert set(outcome.counts[:60]) == {1}
    assert set(outcome.counts[80:240]) == {2}
    assert set(outcome.counts[300:]) == {1}
    assert outcome.changes() == 2
    assert not [when for when in outcome.refused if not 60 <= when < 80]
    assert outcome.p99(90, 240) <= always.p99(90, 240) * 1.05  # as if the second had always been there


def test_a_ramp_is_followed_up_and_down() -> None:
    outcome = simulate(lambda t: 2.4 * max(1 - abs(t - 300) / 300, 0), 660)
    assert max(outcome.counts) == 3
    assert outcome.counts[-1] == 1
    assert outcome.changes() == 4  # 1 2 3 2 1


def test_a_burst_brings_no_more_than_it_needs() -> None:
    outcome = simulate(lambda t: 30.0 if 60 <= t < 61 else 0.3, 300, (1, 8))  # a hundred requests at once
    assert max(outcome.counts) <= 3
    assert outcome.counts[-1] == 1


@pytest.mark.parametrize("load", [0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.8])
def test_a_steady_load_brings_no_replica_and_takes_it_again(load: float) -> None:
    outcome = simulate(lambda _: load, 900, seed=7)
    assert outcome.changes(120) <= 1


SERVE = """
import os, sys, time
from pathlib import Path
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from pipelines.ray_local import ray_running
from pipelines.service.scaling import TIMES

class Toy:
    def __init__(self, script):
        self.script, self.began = Path(script), time.time()

    def record_autoscaling_stats(self):
        busy = self.script.exists()
        return {
            "tokens_waiting": 0, "tokens_computed": 1000 * (time.time() - self.began), "running": 8.0 if busy else 0.5,
            "waiting": 3 if busy else 0, "slots": 8, "kv_usage": 0.1, "admitted": 10, "refused": 0,
        }

def until(count, seconds):
    end = time.monotonic() + seconds
    while serve.status().applications["app"].deployments["Toy"].replica_states.get("RUNNING", 0) != count:
        assert time.monotonic() < end, f"not {count} replicas"
        time.sleep(0.1)
    print(f"{time.monotonic() - began:.1f} s: {count}", flush=True)

script = Path(sys.argv[1])
with ray_running(None, 4):
    serve.start(proxy_location="Disabled")
    began = time.monotonic()
    scaling = AutoscalingConfig(
        min_replicas=1, max_replicas=2, **{**TIMES, "look_back_period_s": 5, "downscale_delay_s": 2},
        policy=AutoscalingPolicy(policy_function="pipelines.service.scaling:Policy", policy_kwargs={"goal_s": 0.5}),
    )
    toy = serve.deployment(Toy).options(
        autoscaling_config=scaling, ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.1
    )
    serve.run(toy.bind(str(script)), name="app", route_prefix=None)
    until(1, 60)
    time.sleep(2)
    until(1, 1)
    script.touch()
    until(2, 60)
    script.unlink()
    until(1, 60)
    serve.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_replicas_come_and_go_through_ray_serve(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(tmp_path / "busy")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
