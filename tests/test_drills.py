"""Kill a worker, kill the driver, press Ctrl-C: the same command goes on, and the weights are those of a calm run."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import left_over, nanochat, plan
from tests.drills import DRILL, ONLY, Base, train_workers, undisturbed, until

pytestmark = [pytest.mark.drill, pytest.mark.ray]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    with undisturbed(tmp_path_factory.mktemp("calm"), DRILL) as base:
        yield base


@pytest.fixture
def base(calm: Base, tmp_path: Path) -> Iterator[Base]:
    """All that `base` builds on is built, and `base` is not."""
    one = Base(tmp_path, DRILL)
    one.build_on(calm)
    yield one
    one.end()
    assert left_over(tmp_path) == []


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(calm: Base, base: Base) -> None:
    process = base.start()
    until(base.committed, process)
    killed = train_workers(process.pid)
    assert killed, "no training worker was found"
    for worker in killed:
        worker.kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert base.weights() == calm.weights()


def test_a_killed_driver_goes_on_from_its_last_checkpoint(calm: Base, base: Base) -> None:
    process = base.start()
    first = until(base.committed, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert plan(base.home, DRILL)["base"]["state"] == "partial"
    lost = {line["pid"] for line in base.taken()}  # a worker may live a moment longer than its driver
    began, again = time.time(), base.start()
    back = until(lambda: next((line for line in base.taken() if line["pid"] not in lost), None), again)
    assert back["step"] > first
    print(f"seconds from the command to the first step: {back['at'] - began:.1f}")
    assert back["at"] - began < 40
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert base.weights() == calm.weights()


def test_ctrl_c_leaves_a_state_to_go_on_from(calm: Base, base: Base) -> None:
    process = base.start()
    until(base.committed, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "same command" in said
    assert "Traceback" not in said
    assert left_over(base.home) == []
    done = nanochat(base.home, "run", DRILL, *ONLY)
    assert done.returncode == 0, done.stderr
    assert base.weights() == calm.weights()


def test_a_damaged_checkpoint_is_passed_over(calm: Base, base: Base) -> None:
    process = base.start()
    first = until(base.committed, process)
    until(lambda: base.committed() > first, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    file = base.folder / "work" / f"step-{base.committed():08d}" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = nanochat(base.home, "run", DRILL, *ONLY)
    assert done.returncode == 0, done.stderr
    assert base.weights() == calm.weights()


def test_two_runs_at_once_build_it_once(calm: Base, base: Base) -> None:
    process = base.start()
    until(base.committed, process)
    other = nanochat(base.home, "run", DRILL, *ONLY)
    assert other.returncode == 1
    assert f":{process.pid}" in other.stderr
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert base.weights() == calm.weights()
