"""A Ray of one machine: which processes it has while it trains, and which of them stand back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import json, os, sys, time
from pathlib import Path
import psutil
from pipelines.ray_local import prepare, ray_running

prepare(os.environ, Path(sys.argv[1]))
import ray  # reads its settings when it is imported
program = os.getpid()

def family():
    return [
        (" ".join(one.cmdline()), [os.sched_getscheduler(thread.id) == os.SCHED_IDLE for thread in one.threads()])
        for one in psutil.Process(program).children(recursive=True)
    ]

def look(settings):
    ray.get(settings["board"].put.remote({"step": 1}))
    end = time.monotonic() + 20
    while not any(any(threads) for _, threads in family()) and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(0.5)
    Path(settings["seen"]).write_text(json.dumps(family()))

with ray_running(None, 2):
    from ray.train import RunConfig, ScalingConfig
    from pipelines.stages._fit import followed_board
    from pipelines.stages._trainer import LeanTrainer
    with followed_board(lambda *said: None) as board:
        LeanTrainer(
            look,
            train_loop_config={"seen": sys.argv[1] + "/seen", "board": board},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=sys.argv[1]),
        ).fit()
"""


@pytest.mark.ray
def test_a_training_has_no_process_that_nobody_asks(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "seen").read_text())
    seen = [process for process, _ in found]

    def count(*words: str) -> list[int]:
        return [sum(word in process for process in seen) for word in words]

    assert count("raylet/raylet", "gcs_server", "ray::TrainController", "ray::RayTrainWorker") == [1, 1, 1, 2]
    helpers = ["log_monitor.py", "autoscaler/_private/monitor.py", "dashboard/dashboard.py"]
    helpers += ["DatasetManager", "PlacementGroupCleaner", "AutoscalingCoordinator", "ray::IDLE"]
    assert count(*helpers) == [0] * 7, seen
    back = {process.split()[0] for process, threads in found if all(threads)}
    names = {"ray::Board", "ray::TrainController.run", "ray::SynchronizationActor", "ray::DashboardAgent"}
    assert back == names
    assert not any(any(threads) for process, threads in found if process.split()[0] not in names)
