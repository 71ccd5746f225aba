"""Workers that come and go, and die while they write: every row is trained on once, in order, and nothing is lost."""

import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import BIN, left_over
from tests.drills import DRILL, Base, undisturbed, until

pytestmark = [pytest.mark.drill, pytest.mark.ray]

LONG = DRILL | {"base.tokens": "4_000_000", "place.base.micro_batch": "16", "place.base.retries": "30"}
KILLS = 20


Make = Callable[..., Base]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    with undisturbed(tmp_path_factory.mktemp("calm"), LONG) as base:
        yield base


@pytest.fixture
def make(calm: Base, tmp_path: Path) -> Iterator[Make]:
    """Of settings and environment: all that `base` builds on is built, and `base` is not."""
    made = []

    def make(settings: dict[str, str], **environment: str) -> Base:
        made.append(Base(tmp_path, LONG | settings, **environment))
        made[-1].build_on(calm)
        return made[-1]

    yield make
    for base in made:
        base.end()
    assert left_over(tmp_path) == []


def groups(base: Base) -> list[list[dict[str, Any]]]:
    """What the first worker of each group of workers took."""
    lines = [line for line in base.taken() if line["rank"] == 0]
    pids = list(dict.fromkeys(line["pid"] for line in lines))
    return [[line for line in lines if line["pid"] == pid] for pid in pids]


def assert_clean(base: Base) -> None:
    """The artifact, its newest checkpoints, and nothing that a try left."""
    files = [str(path.relative_to(base.folder)) for path in base.folder.rglob("*") if path.is_file()]
    steps = {name.split("/")[1] for name in files if name.startswith("work/step-")}
    assert len(steps) <= 2
    assert len(list(base.folder.glob("data-*"))) == 1
    expected = (
        r"manifest\.json|work/\.lease-\d+\.json|(data|sums)-\w+/(tensorboard/)?[\w.]+|"
        r"work/step-\d+/(manifest\.json|state\.json|model\.safetensors|optim(-\d+-of-\d+)?\.safetensors)"
    )
    assert [name for name in files if not re.fullmatch(expected, name)] == []
    assert not any(path.is_dir() and not any(path.iterdir()) for path in base.folder.rglob("*"))


class Node:
    """A node of Ray's, with one CPU: a process of its own, that can be lost with all that it started."""

    def __init__(self, base: Base, *arguments: str) -> None:
        command = [str(BIN / "ray"), "start", *arguments, "--num-cpus=1", "--object-store-memory=100000000", "--block"]
        self.process = subprocess.Popen(
            command, env=base.environment, cwd=base.home, stdout=subprocess.DEVNULL, text=True
        )

    def kill(self) -> None:
        if self.process.poll() is None:
            for one in psutil.Process(self.process.pid).children(recursive=True):
                one.kill()
        self.process.kill()
        self.process.wait()


class Cluster:
    """One node, and those that join it, for a `base` with one or two workers."""

    def __init__(self, make: Make, **settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.base = make(
            {"place.base.workers": "[1, 2]", "place.base.parallel": "zero1"} | settings,
            RAY_ADDRESS=f"127.0.0.1:{self.port}",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="8",  # a try with what a lost node had takes all of it
            RAY_health_check_period_ms="500",
            RAY_health_check_timeout_ms="1000",
            RAY_health_check_failure_threshold="3",
        )
        # In the common folder Ray would leave the address, and every later `ray.init` would look for this cluster.
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets are made inside
        head = Node(
            self.base,
            "--head",
            f"--port={self.port}",
            "--node-ip-address=127.0.0.1",
            "--include-dashboard=False",
            f"--temp-dir={self.folder}",
        )
        self.nodes = [head]
        try:
            until(self._answers, head.process)
        except AssertionError:
            self.end()
            raise

    def join(self) -> Node:
        """One more, which the others know when this returns."""
        self.nodes.append(Node(self.base, f"--address=127.0.0.1:{self.port}"))
        count = [str(BIN / "python"), "-c", COUNT, str(len(self.nodes))]
        subprocess.run(count, env=self.base.environment, cwd=self.base.home, check=True, timeout=60)
        return self.nodes[-1]

    def end(self) -> None:
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder)

    def _answers(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0


COUNT = """
import sys, time, ray
ray.init(address="auto", log_to_driver=False)
while len(ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.1)
"""
DRAIN = """
import subprocess, sys, ray
ray.init(address="auto", log_to_driver=False)
[node] = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" not in node["Resources"]]
reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60"]
subprocess.run([sys.argv[1], "drain-node", f"--address={sys.argv[2]}", f"--node-id={node}", *reason], check=True)
"""


@pytest.fixture
def cluster(make: Make) -> Iterator[Cluster]:
    one = Cluster(make)
    yield one
    one.end()


def test_a_lost_worker_and_one_that_comes_back_change_nothing(calm: Base, cluster: Cluster) -> None:
    base, second = cluster.base, cluster.join()
    process = base.start()

    def grown(count: int, world: int) -> bool:
        """Whether the newest group is the one of that number, has that size, and a checkpoint of its own."""
        there = groups(base)
        return len(there) >= count and there[-1][-1]["world"] == world and base.committed() > there[-1][0]["step"]

    until(lambda: grown(1, 2), process)
    parts = {path.name for path in base.folder.glob("work/step-*/optim*")}
    assert parts == {"optim-00000-of-00002.safetensors", "optim-00001-of-00002.safetensors"}
    until(lambda: list(base.folder.glob("work/tensorboard/events.*")), process)
    second.kill()
    lost = time.time()
    until(lambda: grown(2, 1), process)
    back = time.time()
    cluster.join()
    until(lambda: grown(3, 2), process)
    print(
        f"alone after {groups(base)[1][0]['at'] - lost:.1f} s, two again after {groups(base)[-1][0]['at'] - back:.1f} s"
    )
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert base.applied() == calm.applied()
    assert [row["step"] for row in base.steps()] == [row["step"] for row in calm.steps()]
    assert base.steps()[-1]["loss"] == pytest.approx(calm.steps()[-1]["loss"], abs=1e-4)
    assert_clean(base)


def test_a_node_that_will_be_taken_away_saves_first(calm: Base, make: Make) -> None:
    """With a minute's notice, as of a spot instance; no checkpoint was due before."""
    cluster = Cluster(make, **{"place.base.checkpoint_s": "1000"})
    try:
        base, second = cluster.base, cluster.join()
        process = base.start()
        until(lambda: any(line["rank"] == 1 and line["step"] > 5 for line in base.taken()), process)
        assert base.committed() == 0
        drain = [str(BIN / "python"), "-c", DRAIN, str(BIN / "ray"), f"127.0.0.1:{cluster.port}"]
        told = time.time()
        subprocess.run(drain, env=base.environment, cwd=base.home, check=True, timeout=60)
        saved = until(base.committed, process)
        print(f"saved {time.time() - told:.1f} s after the command that gives notice began")
        second.kill()
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert [group[0]["step"] for group in groups(base)] == [1, saved + 1]
        assert base.applied() == calm.applied()
        assert base.steps()[-1]["loss"] == pytest.approx(calm.steps()[-1]["loss"], abs=1e-4)
        assert_clean(base)
    finally:
        cluster.end()


def test_death_at_any_moment_loses_nothing_that_was_committed(calm: Base, make: Make) -> None:
    """Almost all the time a checkpoint is being written."""
    base = make({"place.base.checkpoint_s": "0.02"})
    process, draw = base.start(), random.Random(5)
    away = []
    for number in range(1, KILLS + 1):
        until(lambda wanted=number: len(groups(base)) == wanted and len(groups(base)[-1]) > 1, process)
        time.sleep(draw.uniform(0, 1.5))
        worker = groups(base)[-1][-1]["pid"]
        committed, killed = base.committed(), time.time()
        psutil.Process(worker).kill()
        until(lambda wanted=number: len(groups(base)) > wanted and len(groups(base)[-1]) > 1, process)
        first, second = groups(base)[-1][:2]
        assert first["step"] > committed
        away.append(second["at"] - killed)
    print("seconds until a worker is back in step:", *(f"{seconds:.1f}" for seconds in away))
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert base.applied() == calm.applied()
    assert base.weights() == calm.weights()
    assert_clean(base)
    assert max(away) < 15


def test_a_worker_that_is_told_to_end_saves_first(calm: Base, make: Make) -> None:
    """SIGTERM to the second of two: the checkpoint is of the step they have done, so that no step is done twice."""
    base = make({"place.base.workers": "2", "place.base.checkpoint_s": "100"})
    process = base.start()
    line = until(lambda: next((line for line in base.taken() if line["rank"] == 1 and line["step"] > 5), None), process)
    psutil.Process(line["pid"]).send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert len(groups(base)) == 2
    assert len(base.taken()) == 2 * len(calm.taken())
    assert base.applied() == calm.applied()
    assert base.steps()[-1]["loss"] == pytest.approx(calm.steps()[-1]["loss"], abs=1e-4)
    assert_clean(base)


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_told_to_end_lets_its_workers_save_first(calm: Base, make: Make, told: signal.Signals) -> None:
    base = make({"place.base.checkpoint_s": "100"})
    process = base.start()
    until(lambda: len(base.taken()) > 5, process)
    process.send_signal(told)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "base: saves after this step; Ctrl-C again ends it at once" in said
    assert "Traceback" not in said
    assert left_over(base.home) == []
    began, process = time.time(), base.start()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    first, again = groups(base)
    assert again[0]["step"] == first[-1]["step"] + 1
    assert all(b["step"] == a["step"] + 1 for a, b in pairwise(first + again))
    assert base.weights() == calm.weights()
    print(f"seconds from the command to the first step: {again[0]['at'] - began:.1f}")
    assert_clean(base)
