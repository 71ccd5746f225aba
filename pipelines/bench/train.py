"""What Ray costs a training: the same loop by torchrun's processes and by Ray Train's, in turn, on the same cores.

While torchrun's ranks are timed every process of Ray is stopped (SIGSTOP), so they have the machine as if there were no
Ray; while Ray's are timed, torchrun's sleep. Ray is begun and set as `nanochat run` does it.

    nanochat bench train --against torchrun
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import LoggingConfig

from nanochat.bench.measure import Measurement, measurement
from nanochat.bench.train import TORCHRUN, about, config_of
from nanochat.bench.trainer import WARM_UP
from nanochat.train import StepDone
from pipelines.bench.group import END_S, Group, listening, torchrun
from pipelines.bench.ranks import RankSetup, serve
from pipelines.processes import cpu_seconds, descendants, name, paused
from pipelines.ray_local import ray_running
from pipelines.stages._fit import heard, news
from pipelines.stages._trainer import LeanTrainer

STARTS = 3  # of Ray's workers, one after the other
SETTLE_S = 3.0  # for what Ray has to catch up on after it was stopped
LEAST_CORES = 0.001  # of a kind of Ray's processes that is named


def against_torchrun(args: argparse.Namespace) -> Iterator[Measurement]:
    """One worker with all threads, then two that share them, by Ray Train and by torchrun; then one beside two."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanochat-")))
        setups = {world: _setup(args, args.threads // world) for world in (1, 2)}
        plain: dict[int, Group] = {}
        theirs: set[int] = set()
        for world, setup in setups.items():
            plain[world], pids = stack.enter_context(torchrun(world, setup, folder))
            plain[world].steps(WARM_UP)
            theirs |= pids
        stack.enter_context(ray_running(None, args.threads + 1))
        rounds = _Rounds(plain, theirs, args.steps // args.runs, args.runs)
        for world, setup in setups.items():
            starts = []
            for number in range(STARTS):
                with _by_ray(world, setup, folder) as (group, start):
                    starts.append(start())
                    if number == STARTS - 1:
                        group.steps(WARM_UP)
                        found = rounds.run(group)
            case = f"depth {args.depth}, {args.precision}, {_shape(world, setup)}"
            yield _beside(f"{case}, Ray", found[TORCHRUN], found["ray"], TORCHRUN, args, found["more"])
            yield _started(case, starts, args)
        yield _beside(case, found["one"], found[TORCHRUN], _shape(1, setups[1]), args, {})


@dataclass(frozen=True)
class _Rounds:
    """Slices of steps in turn: torchrun's ranks while Ray is stopped, and Ray's."""

    plain: dict[int, Group]
    theirs: set[int]  # all processes of torchrun
    steps: int
    runs: int

    def run(self, group: Group) -> dict[str, Any]:
        """Tokens/s of torchrun, of Ray, and of torchrun's one rank; what else there is to tell."""
        found: dict[str, Any] = {TORCHRUN: [], "ray": [], "one": []}
        used: defaultdict[str, float] = defaultdict(float)
        timed_s = 0.0
        for _ in range(self.runs):
            rays = descendants(os.getpid()) - self.theirs
            with paused(rays):
                found[TORCHRUN].append(self.plain[group.world].rate(self.steps))
                if group.world > 1:
                    found["one"].append(self.plain[1].rate(self.steps))
            time.sleep(SETTLE_S)
            before = {pid: cpu_seconds(pid) for pid in rays - group.pids}
            began = time.perf_counter()
            found["ray"].append(group.rate(self.steps))
            timed_s += time.perf_counter() - began
            for pid, past in before.items():
                used[name(pid)] += max(0.0, cpu_seconds(pid) - past)
        by_most = sorted(used.items(), key=lambda pair: -pair[1])
        cores = {kind: round(cpu_s / timed_s, 4) for kind, cpu_s in by_most if cpu_s / timed_s >= LEAST_CORES}
        found["more"] = {"cores_of_ray": sum(used.values()) / timed_s, "cores_of_its_processes": cores}
        return found


def _beside(
    case: str, theirs: Sequence[float], ours: Sequence[float], baseline: str, args: argparse.Namespace, more: Any
) -> Measurement:
    """The ratio is the median of the pairs' own, which what the machine does besides changes least."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    told = {**about(args), "ratio_min": min(ratios), "ratio_max": max(ratios), **more}
    told |= {"baseline_min": min(theirs), "baseline_max": max(theirs)}
    one = measurement("train", case, ours, args, told).against(baseline, theirs)
    return replace(one, ratio=statistics.median(ratios))


def _started(case: str, starts: Sequence[dict[str, float]], args: argparse.Namespace) -> Measurement:
    parts = {part: statistics.median(start[part] for start in starts) for part in starts[0]}
    seconds = [sum(start.values()) for start in starts]
    return measurement("train", f"{case}, to first step", seconds, args, parts, unit="s")


def _setup(args: argparse.Namespace, threads: int) -> RankSetup:
    return RankSetup(
        config=config_of(args),
        precision=args.precision,
        threads=threads,
        micro_batch=args.micro_batch,
        steps=1 + WARM_UP + 2 * args.steps,
        shard=threads < args.threads,  # else each of two ranks would orthogonalise all matrices, with half the threads
    )


def _shape(world: int, setup: RankSetup) -> str:
    return f"{world} x {setup.threads} thread{'s' if setup.threads > 1 else ''}{', zero1' if setup.shard else ''}"


@contextmanager
def _by_ray(world: int, setup: RankSetup, folder: Path) -> Iterator[tuple[Group, Callable[[], dict[str, float]]]]:
    """A group begun by Ray Train as pipelines/stages/_fit.py does it; and what does the first step and says where the
    time until its end went.
    """
    stamps = folder / f"stamps-{uuid.uuid4().hex[:8]}"
    with listening(folder) as (server, door):
        group = Group(world)
        trainer = LeanTrainer(
            _work,
            train_loop_config={"door": door},
            torch_config=_Timed(backend="gloo", stamps=str(stamps)),
            scaling_config=ScalingConfig(num_workers=world, resources_per_worker={"CPU": setup.threads}),
            run_config=RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=str(folder / "ray-train"),
                failure_config=FailureConfig(max_failures=0),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        thread = threading.Thread(target=trainer.fit, daemon=True)
        thread.start()

        def first_step() -> dict[str, float]:
            took = group.steps(1)
            workers, process_group = map(float, stamps.read_text().split())
            return {
                "workers_s": workers - group.began,
                "process_group_s": process_group - workers,
                "function_s": group.entered - process_group,
                "model_s": took.until - took.seconds - group.entered,
                "first_step_s": took.seconds,
            }

        try:
            group.meet(server, setup, thread.is_alive)
            with heard(trainer, lambda *said: None):
                yield group, first_step
        finally:
            group.end()
            thread.join(END_S)
            trainer.end()


def _work(settings: dict[str, Any]) -> None:
    """Runs in each of Ray's workers."""
    context = ray.train.get_context()

    def say(done: StepDone) -> None:
        news.latest = asdict(done)

    serve(context.get_world_rank(), context.get_world_size(), settings["door"], say)


class _TimedBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Writes down when all workers are there, and when they know each other."""

    def on_start(self, worker_group: Any, backend_config: "_Timed") -> None:
        with open(backend_config.stamps, "w") as stamps:
            stamps.write(f"{time.time()}\n")
            super().on_start(worker_group, backend_config)
            stamps.write(f"{time.time()}\n")


@dataclass
class _Timed(TorchConfig):  # type: ignore[misc]
    stamps: str = ""

    @property
    def backend_cls(self) -> type:
        return _TimedBackend
