"""A Ray of one machine: which processes it has while it trains."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TRAIN = """
import json, os, sys, time
from pathlib import Path
import psutil
from pipelines.ray_local import end_data_helpers, prepare, ray_running

prepare(os.environ, Path(sys.argv[1]))
import ray  # reads its settings when it is imported
program = os.getpid()

def look(settings):
    time.sleep(3)  # longer than an idle process is kept
    family = psutil.Process(program).children(recursive=True)
    Path(settings["seen"]).write_text(json.dumps([" ".join(one.cmdline()) for one in family]))

with ray_running(None, 2):
    import ray.data
    from ray.train import RunConfig, ScalingConfig
    from pipelines.stages._trainer import LeanTrainer
    if sys.argv[2] == "1":  # after another stage
        ray.data.range(2).map_batches(lambda batch: batch).materialize()
        end_data_helpers()
    LeanTrainer(
        look,
        train_loop_config={"seen": sys.argv[1] + "/seen"},
        scaling_config=ScalingConfig(num_workers=int(sys.argv[2])),
        run_config=RunConfig(storage_path=sys.argv[1]),
    ).fit()
"""


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_has_no_process_that_nobody_asks(tmp_path: Path, workers: int) -> None:
    train = [sys.executable, "-c", TRAIN, str(tmp_path), str(workers)]
    done = subprocess.run(train, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = Counter(Path(process.split()[0]).name for process in json.loads((tmp_path / "seen").read_text()))
    agents = {"ray::DashboardAgent": 1, "ray::RuntimeEnvAgent": 1}  # of which raylet makes its own life depend
    assert seen == {"gcs_server": 1, "raylet": 1, **agents, "ray::RayTrainWorker": workers}
