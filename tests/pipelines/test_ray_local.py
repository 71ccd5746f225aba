"""A Ray of one machine: which processes it has while it trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.ray_local import WATCHERS

TRAIN = """
import json, os, sys, time
from pathlib import Path
import psutil
from pipelines.ray_local import prepare, ray_running

prepare(os.environ, Path(sys.argv[1]))
program = os.getpid()

def look(settings):
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(settings["board"].put.remote({"step": 1}))
        time.sleep(4)
        family = psutil.Process(program).children(recursive=True)
        seen = [(" ".join(process.cmdline()), process.nice()) for process in family]
        Path(settings["seen"]).write_text(json.dumps(seen))
    ray.train.report({})

with ray_running(None, 2):
    import ray.train
    from ray.train import RunConfig, ScalingConfig
    from pipelines.stages._fit import followed_board
    from pipelines.stages._trainer import LeanTrainer
    with followed_board(lambda row, committed: None) as board:
        LeanTrainer(
            look,
            train_loop_config={"seen": sys.argv[1] + "/seen", "board": board},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=sys.argv[1]),
        ).fit()
"""


@pytest.mark.ray
def test_a_training_has_no_process_that_nobody_asks_and_those_that_watch_come_last(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "seen").read_text())
    seen = [process for process, _ in told]

    def count(*words: str) -> list[int]:
        return [sum(word in process for process in seen) for word in words]

    assert count("raylet/raylet", "gcs_server", "ray::TrainController", "ray::RayTrainWorker") == [1, 1, 1, 2]
    helpers = ["log_monitor.py", "autoscaler/_private/monitor.py", "dashboard/dashboard.py"]
    helpers += ["DatasetManager", "PlacementGroupCleaner", "AutoscalingCoordinator", "ray::IDLE"]
    assert count(*helpers) == [0] * 7, seen
    last = {process for process, nice in told if nice == 19}
    assert {process.split()[0].partition(".")[0] for process in last} == set(WATCHERS)
    assert all(nice == 0 for process, nice in told if process not in last), told
