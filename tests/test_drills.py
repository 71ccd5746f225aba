"""Kill a worker, kill the driver, press Ctrl-C: the same command goes on, and the weights are those of a calm run."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import TINY, arguments, environment, left_over, nanochat, plan

pytestmark = [pytest.mark.drill, pytest.mark.ray]

# Long enough to be killed in the middle, with a checkpoint every second.
DRILL = {
    **TINY,
    "base.tokens": "480_000",
    "place.base.checkpoint_s": "1",
    "place.base.retries": "2",
    "place.base.cpus": "1",
}
ONLY = ("--only", "base")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A home in which `base` was built without a disturbance, by one worker, and its checkpoint's hash."""
    home = tmp_path_factory.mktemp("calm")
    done = nanochat(home, "run", DRILL, *ONLY, "--json")
    assert done.returncode == 0, done.stderr
    return {"home": home, "weights": weights(home)}


@pytest.fixture
def home(calm: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    """A home where everything that `base` builds on is built, and `base` is not."""
    store = ".cache/nanochat-ray"
    for part in ("vocabulary", "token_shards"):
        shutil.copytree(calm["home"] / store / part, tmp_path / store / part)
    yield tmp_path
    assert left_over(tmp_path) == []


def weights(home: Path) -> str:
    """sha256 of the built checkpoint's weights."""
    folder = Path(plan(home, DRILL)["base"]["path"])
    manifest = json.loads((folder.parent / "manifest.json").read_text())
    return next(f["sha256"] for f in manifest["files"] if f["path"] == "model.safetensors")


def work(home: Path) -> Path:
    return home / ".cache/nanochat-ray" / str(plan(home, DRILL)["base"]["address"]) / "work"


def start(home: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments("run", DRILL, *ONLY, *more),
        env=environment(home),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], newer_than: int = 0) -> int:
    """Waits until a checkpoint is committed; returns its step."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        steps = [int(p.parent.name.removeprefix("step-")) for p in folder.glob("step-*/manifest.json")]
        if max(steps, default=0) > newer_than:
            return max(steps)
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("no checkpoint within 120 s")


def train_workers(driver: int) -> list[psutil.Process]:
    """The processes of this driver's Ray that train."""
    return [p for p in psutil.Process(driver).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(calm: dict[str, Any], home: Path) -> None:
    process = start(home)
    wait_for_checkpoint(work(home), process)
    killed = train_workers(process.pid)
    assert killed, "no training worker was found"
    for worker in killed:
        worker.kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert weights(home) == calm["weights"]


def test_a_killed_driver_goes_on_from_its_last_checkpoint(calm: dict[str, Any], home: Path) -> None:
    process = start(home)
    first = wait_for_checkpoint(work(home), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert plan(home, DRILL)["base"]["state"] == "partial"
    again = start(home)
    second = wait_for_checkpoint(work(home), again, newer_than=first)
    assert second > first
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert weights(home) == calm["weights"]


def test_ctrl_c_leaves_a_state_to_go_on_from(calm: dict[str, Any], home: Path) -> None:
    process = start(home)
    wait_for_checkpoint(work(home), process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "same command" in said
    assert "Traceback" not in said
    assert left_over(home) == []
    done = nanochat(home, "run", DRILL, *ONLY)
    assert done.returncode == 0, done.stderr
    assert weights(home) == calm["weights"]


def test_a_damaged_checkpoint_is_passed_over(calm: dict[str, Any], home: Path) -> None:
    process = start(home)
    folder = work(home)
    first = wait_for_checkpoint(folder, process)
    newest = wait_for_checkpoint(folder, process, newer_than=first)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = max(int(p.parent.name.removeprefix("step-")) for p in folder.glob("step-*/manifest.json"))
    file = folder / f"step-{newest:08d}" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = nanochat(home, "run", DRILL, *ONLY)
    assert done.returncode == 0, done.stderr
    assert weights(home) == calm["weights"]


def test_two_runs_at_once_build_it_once(calm: dict[str, Any], home: Path) -> None:
    process = start(home)
    wait_for_checkpoint(work(home), process)
    other = nanochat(home, "run", DRILL, *ONLY)
    assert other.returncode == 1
    assert f":{process.pid}" in other.stderr
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert weights(home) == calm["weights"]
