"""A trainer whose controller is a thread of its driver: what it hears of its workers, and how they end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

INTERRUPTED = """
import builtins, json, os, signal, sys, threading, time
from pathlib import Path
import psutil
from pipelines.ray_local import prepare, ray_running

folder, saves = Path(sys.argv[1]), sys.argv[2] == "saves"
prepare(os.environ, folder)

def loop():
    starts = folder / "starts"
    starts.open("a").write("x")
    if starts.read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    builtins.told = threading.Event()  # what all functions of the worker's process see
    builtins.told.wait(60)
    (folder / "saved").write_text("all")
    raise RuntimeError("told to end")

def hello():
    return os.getpid() if hasattr(builtins, "told") else None

def tell():
    if saves:
        builtins.told.set()
    return os.getpid()

def interrupt():
    while not trainer.ask_first(hello):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

with ray_running(None, 2):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from pipelines.stages._trainer import LeanTrainer
    run = RunConfig(storage_path=str(folder), failure_config=FailureConfig(max_failures=3))
    trainer = LeanTrainer(loop, scaling_config=ScalingConfig(num_workers=1), run_config=run)
    before = trainer.ask_first(hello)
    threading.Thread(target=interrupt).start()
    try:
        trainer.fit()
    except KeyboardInterrupt:
        worker = trainer.ask_first(tell)
        began = time.monotonic()
        trainer.let_end(20 if saves else 0)
        waited = time.monotonic() - began
        trainer.end()
    time.sleep(1)
    found = {"before": before, "waited": waited, "alive": psutil.pid_exists(worker), "after": trainer.ask_first(hello)}
    found["starts"] = len((folder / "starts").read_text())
    (folder / "found").write_text(json.dumps(found))
"""


def interrupted(folder: Path, how: str) -> dict[str, Any]:
    """Two starts of a worker, the first of which is lost; then Ctrl-C to the driver."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(folder), how], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "found").read_text())
    return found


@pytest.mark.ray
def test_a_lost_worker_comes_back_and_one_that_is_told_to_end_may_save(tmp_path: Path) -> None:
    found = interrupted(tmp_path, "saves")
    assert found["waited"] < 15
    assert (tmp_path / "saved").read_text() == "all"
    assert found | {"waited": 0} == {"before": None, "waited": 0, "alive": False, "after": None, "starts": 2}


@pytest.mark.ray
def test_workers_that_do_not_leave_are_ended(tmp_path: Path) -> None:
    found = interrupted(tmp_path, "hangs")
    assert not (tmp_path / "saved").exists()
    assert found | {"waited": 0} == {"before": None, "waited": 0, "alive": False, "after": None, "starts": 2}
