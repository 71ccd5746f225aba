"""A Ray of one machine: which processes it has while it trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import json, os, sys
from pathlib import Path
import psutil
from pipelines.ray_local import prepare, ray_running

prepare(os.environ, Path(sys.argv[1]))
program = os.getpid()

def look(settings):
    family = psutil.Process(program).children(recursive=True)
    Path(settings["seen"]).write_text(json.dumps([" ".join(process.cmdline()) for process in family]))

with ray_running(None, 2):
    from ray.train import RunConfig, ScalingConfig
    from pipelines.stages._trainer import LeanTrainer
    LeanTrainer(
        look,
        train_loop_config={"seen": sys.argv[1] + "/seen"},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=sys.argv[1]),
    ).fit()
"""


@pytest.mark.ray
def test_a_training_has_no_process_that_nobody_asks(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen").read_text())

    def count(*words: str) -> list[int]:
        return [sum(word in process for process in seen) for word in words]

    assert count("raylet/raylet", "gcs_server", "ray::TrainController", "ray::RayTrainWorker") == [1, 1, 1, 2]
    helpers = ["log_monitor.py", "autoscaler/_private/monitor.py", "dashboard/dashboard.py"]
    helpers += ["DatasetManager", "PlacementGroupCleaner", "AutoscalingCoordinator", "ray::IDLE"]
    assert count(*helpers) == [0] * 7, seen
