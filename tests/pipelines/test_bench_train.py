"""What Ray costs a training: both sides do the same steps, Ray sleeps while the other is timed, and what is told."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat.bench import train as bench
from nanochat.bench.trainer import BATCH_TOKENS, CONTEXT, OPTIM, VOCABULARY, Text
from nanochat.config import ModelConfig
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.train import TrainPlan, train
from pipelines.bench import train as ray_bench
from pipelines.bench.group import Group, torchrun
from pipelines.bench.ranks import RankSetup
from pipelines.bench.train import _beside, _Rounds
from pipelines.processes import cpu_seconds, descendants, name, paused

SLEEP = "import time; time.sleep(60)"
SPIN = "while True: pass"
CONFIG = ModelConfig(depth=1, context=CONTEXT, head_dim=64)


@pytest.fixture
def start() -> Iterator[Callable[[str], int]]:
    """Starts Python on a line of code; returns its process id."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(code: str) -> int:
        begun.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        return begun[-1].pid

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_processes_are_found_and_what_they_use(start: Callable[[str], int]) -> None:
    asleep = start(f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{SLEEP}'])")
    busy = start(SPIN)
    until(lambda: bool(descendants(asleep)))
    (grandchild,) = descendants(asleep)
    assert {asleep, busy, grandchild} <= descendants(os.getpid())
    assert name(busy).startswith("python")
    until(lambda: cpu_seconds(busy) > 0.1)
    with paused([busy, grandchild]):
        until(lambda: state(busy) == state(grandchild) == "T")
        stopped = cpu_seconds(busy)
        time.sleep(0.1)
        assert cpu_seconds(busy) == stopped
    until(lambda: cpu_seconds(busy) > stopped)
    os.kill(grandchild, signal.SIGKILL)
    until(lambda: not descendants(asleep))
    assert (cpu_seconds(grandchild), name(grandchild)) == (0.0, "gone")
    with paused([grandchild]):
        pass


def setup(threads: int = 1) -> RankSetup:
    return RankSetup(config=CONFIG, precision="fp32", threads=threads, micro_batch=8, steps=10)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """The same losses as the loop without ranks, on whole batches; asked for in slices."""
    with torchrun(2, setup(), tmp_path) as (group, pids):
        assert group.pids < pids
        assert group.rate(2) > 100
        found = [group.steps(1).loss, group.steps(2).loss]
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    model = GPT(CONFIG, VOCABULARY).reset(0)
    plan = TrainPlan(steps=10, batch_tokens=BATCH_TOKENS, optim=OPTIM)
    steps = train(model, build_optimizer(model, OPTIM, "fp32"), Text(4).step, plan)
    losses = [next(steps).loss for _ in range(5)]
    assert found == pytest.approx([losses[2], losses[4]], rel=1e-5)


def test_ranks_that_do_not_come_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = RankSetup(config=CONFIG, precision="fp4", threads=1, micro_batch=8, steps=10)
    with pytest.raises(RuntimeError, match="a rank ended while it trained"), torchrun(1, wrong, tmp_path) as (group, _):
        group.steps(1)
    assert "KeyError: 'fp4'" in capfd.readouterr().err


class Timed(Group):
    """Says in which state the process beside it was whenever it was asked for steps."""

    def __init__(self, world: int, rates: list[float], beside: int) -> None:
        super().__init__(world)
        self.rates, self.beside, self.states = iter(rates), beside, set[str]()

    def rate(self, count: int) -> float:
        time.sleep(0.2)
        self.states.add(state(self.beside))
        return next(self.rates)


def test_ray_sleeps_while_torchrun_is_timed(start: Callable[[str], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that spins stands for Ray: it is stopped in the others' slices, and is charged for its own."""
    monkeypatch.setattr(ray_bench, "SETTLE_S", 0.0)
    spins, sleeps = start(SPIN), start(SLEEP)
    until(lambda: cpu_seconds(spins) > 0.1)
    plain = {1: Timed(1, [50, 50], spins), 2: Timed(2, [100, 200], spins)}
    by_ray = Timed(2, [99, 150], spins)
    found = _Rounds(plain, {sleeps}, 3, 2).run(by_ray)
    assert (plain[1].states, plain[2].states, by_ray.states) == ({"T"}, {"T"}, {"R"})
    assert (found["torchrun"], found["ray"], found["one"]) == ([100, 200], [99, 150], [50, 50])
    assert 0.3 < found["more"]["cores_of_ray"] < 1.2
    assert sum(found["more"]["cores_of_its_processes"].values()) == pytest.approx(
        found["more"]["cores_of_ray"], abs=0.01
    )


def args(**changes: object) -> Namespace:
    told = {"depth": 1, "threads": 2, "precision": "fp32", "micro_batch": 8, "steps": 2, "runs": 1}
    return Namespace(**(told | {"device": "cpu", "commit": None, "json": True} | changes))


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    """Each pair is made while the machine is in one mood; medians of either side may be of different moods."""
    one = _beside("case", [100, 50, 80], [99, 48, 40], "torchrun", args(), {})
    assert one.ratio == 48 / 50
    assert (one.value, one.baseline_value, one.baseline) == (48, 80, "torchrun")
    assert (one.more["ratio_min"], one.more["ratio_max"]) == (0.5, 0.99)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "torchrun"], "needs the whole package: nanochat bench train --against torchrun"),
        (["--against", "torchrun", "--threads", "3"], "--threads is 3; use an even number"),
        (["--against", "torchrun", "fp32"], "ask for them alone"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit, match="2"):
        bench.main([*options, "--device", "cpu"])
    assert said in capsys.readouterr().err


def test_the_whole_package_makes_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`nanochat bench train --against torchrun` reaches it, with seven runs of sixteen steps each."""
    from pipelines import cli

    def compare(asked: Namespace) -> Iterator[bench.Measurement]:
        assert (asked.runs, asked.steps, asked.against) == (7, 112, ["torchrun"])
        yield _beside("case", [100], [99], "torchrun", asked, {})

    monkeypatch.setattr(cli, "prepare", lambda environment, home: None)
    monkeypatch.setattr(ray_bench, "against_torchrun", compare)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    assert cli.main(["bench", "train", "--against", "torchrun", "--threads", "2", "--depth", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == 0.99


@pytest.mark.slow
@pytest.mark.ray
def test_ray_beside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_bench, "STARTS", 1)
    monkeypatch.setattr(ray_bench, "LEAST_CORES", 0.0)  # two steps may be too short for a process to use anything
    rows = list(ray_bench.against_torchrun(args()))
    assert [(row.unit, row.baseline) for row in rows] == [
        ("tokens/s", "torchrun"),
        ("s", None),
        ("tokens/s", "torchrun"),
        ("s", None),
        ("tokens/s", "1 x 2 threads"),
    ]
    for row in rows:
        if row.unit == "s":
            assert row.value == pytest.approx(sum(row.more[part] for part in row.more if part.endswith("_s")))
            assert all(row.more[part] > 0 for part in row.more if part.endswith("_s"))
        elif row.baseline == "torchrun":
            assert 0 < row.more["cores_of_ray"] < 2
            assert {"raylet", "gcs_server"} <= set(row.more["cores_of_its_processes"])
