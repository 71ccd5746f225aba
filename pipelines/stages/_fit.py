"""A nanochat training loop handed to Ray Train: what pretrain and sft have in common.

The workers read their rows from the shards, write their own checkpoints, and keep what there is to tell until the
driver asks. `ray.train.report` is not called: Ray paces it by a poll of its controller, and what it acknowledges can
still be lost (docs/DECISIONS.md). What counts is the newest checkpoint that has its own manifest; a worker that is
lost, or a number of workers that changes, is a new start from there.
"""

import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.config import LoggingConfig

from nanochat import checkpoint
from nanochat.checkpoint import Saver
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Index, TokenLoader
from nanochat.flops import parameters
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.parallel import Ranks
from nanochat.train import StepDone, TrainPlan, train
from pipelines.artifacts import Dir
from pipelines.curves import EVENTS, TRACE, LiveCurves, Observer, Row, event_file, numbers, summary, traced
from pipelines.runner import Job, Progress
from pipelines.spec import Place
from pipelines.stages._trainer import LeanTrainer

STEPS = "steps.jsonl"  # one line a step, in the artifact
SAY_EVERY_S = 1.0
BREATH_S = 0.05  # between two questions, for whoever else has one
GRACE_S = 15.0  # for the workers to save, when the driver is told to end
RAY_FILES = "ray-train"  # a folder beside work/ for what Ray Train writes for itself; of no use to us

# What a rank asks for at the end of a step. The greatest that any of them asks for is what all do.
GO_ON, SAVE, LEAVE = 0, 1, 2

told_to_end = threading.Event()  # by SIGTERM, or by the driver; of a worker's whole process, as signals are


class ToldToEndError(RuntimeError):
    """The workers saved and left, because one of them was told to."""


@dataclass(frozen=True)
class Fit:
    """One training, as its workers need it. Everything here is plain data or can be pickled."""

    model: ModelConfig
    vocab_size: int
    start: Dir | None  # weights to begin with; None draws them from the seed
    shards: Dir
    index: Index
    steps: int
    batch_tokens: int
    optim: OptimConfig
    precision: Literal["bf16", "fp32"]
    seed: int
    mask_documents: bool = False


@dataclass
class News:
    """What rank 0 has to tell. It stays in its process until the driver asks, so nobody waits for anybody."""

    latest: Row | None = None  # the newest step
    committed: int = 0  # a restart goes on from this step, or from a later one


news = News()  # of this process, which is of one start of one rank
over = threading.Event()  # its training


def fit(job: Job, task: Fit) -> dict[str, float]:
    """Trains, and leaves config.json, model.safetensors and steps.jsonl in `job.out`. Returns the metrics."""
    place, store, address = job.step.place, job.work.store, job.step.address
    resources = {"CPU": place.cpus} | ({"GPU": 1} if place.gpu else {})
    store.remove(address, RAY_FILES)  # of a driver that was killed
    trainer = LeanTrainer(
        _work,
        train_loop_config={"task": task, "out": job.out, "work": job.work, "place": place},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if place.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=place.workers,
            # Growing is a new start too: no more often than checkpoints, or it would never get anywhere.
            elastic_resize_monitor_interval_s=place.checkpoint_s,
            use_gpu=place.gpu is not None,
            resources_per_worker=resources,
            accelerator_type=place.gpu,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:8],  # never the same twice: Ray must not resume by itself
            storage_path=store.dir(address, RAY_FILES).uri(),
            failure_config=FailureConfig(max_failures=place.retries),
            worker_runtime_env=_environment(place),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        with heard(trainer, partial(_say, job)):
            trainer.fit()
    except KeyboardInterrupt:
        if not job.lost() and trainer.ask_first(_end_soon):
            job.note("saves after this step; Ctrl-C again ends it at once")
            trainer.let_end(GRACE_S)
        raise
    finally:
        trainer.end()
        store.remove(address, RAY_FILES)
    return _summary(job, task)


def _environment(place: Place) -> dict[str, dict[str, str]]:
    """What a worker's process must have before it begins: NCCL reads nothing else."""
    named = {}
    if place.nccl and place.nccl.algorithm:
        named["NCCL_ALGO"] = {"ring": "Ring", "tree": "Tree", "nvls": "NVLS"}[place.nccl.algorithm]
    if place.nccl and place.nccl.interface:
        named["NCCL_SOCKET_IFNAME"] = place.nccl.interface
    return {"env_vars": named} if named else {}


def _say(job: Job, row: Row, committed: int) -> None:
    known = numbers(row) | {"checkpoint_step": committed}
    job.say(Progress(done=row["step"], total=row["steps"], unit="step", numbers=known))


@contextmanager
def heard(trainer: LeanTrainer, hear: Callable[[Row, int], None]) -> Iterator[None]:
    """Meanwhile a thread asks rank 0 what it has to tell, and passes on what is new: a step, the committed one."""
    stop = threading.Event()

    def listen() -> None:
        known = None
        while not stop.wait(BREATH_S):
            now = trainer.ask_first(_answer)
            if now and now.latest and (now.latest["step"], now.committed) != known:
                known = now.latest["step"], now.committed
                hear(now.latest, now.committed)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _answer() -> News:
    """After a while in which the thread that calls this, the worker's first, does nothing.

    Else it would look for signals a hundred times a second, and each time stop a thread of the training.
    """
    if news.latest is not None:
        over.wait(SAY_EVERY_S)
    return news


def _end_soon() -> bool:
    """The workers save at the end of their step, and leave. Whether there is something to save."""
    told_to_end.set()
    return news.latest is not None


def _work(settings: dict[str, Any]) -> None:
    """Runs in every worker, at every start and restart: goes on from the newest committed checkpoint."""
    task: Fit = settings["task"]
    work: Dir = settings["work"]
    place: Place = settings["place"]
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(place.cpus)
    device = torch.device("cuda", torch.cuda.current_device()) if place.gpu else torch.device("cpu")
    # Only the main thread may take signals, and it is Ray's: this one is another.
    ray.get(ray.get_runtime_context().current_actor.__ray_call__.remote(_heed_sigterm))

    model = _model(task, device)
    shard = place.parallel == "zero1"
    optimizer = build_optimizer(model, task.optim, task.precision, ranks, shard)
    loader = TokenLoader(
        task.shards,
        task.index,
        batch_tokens=task.batch_tokens,
        seed=task.seed,
        rank=ranks.rank,
        world=ranks.world,
        micro_batch=place.micro_batch,
        mask_documents=task.mask_documents,
        pin=place.gpu is not None,
    )
    start = int(ranks.most(0 if ranks.rank else _resume_point(work)))
    history: list[Row] = checkpoint.restore(work, start, model, optimizer)["history"] if start else []
    ranks.copy_from_first(model.parameters())  # one seed may draw other bits on another kind of processor
    plan = TrainPlan(steps=task.steps, batch_tokens=task.batch_tokens, optim=task.optim)
    steps = train(model, optimizer, loader.step, plan, start=start, ranks=ranks if ranks.world > 1 else None)
    news.committed = start
    if ranks.rank == 0:
        if place.profile:
            out: Dir = settings["out"]
            steps = traced(steps, place.profile, start, lambda trace: out.put(TRACE, trace))
        observer = Observer(task.model, task.vocab_size, device, model.dtype, ranks.world)
        steps = _told(steps, history, observer)
        live = LiveCurves(work, history)

    def committed(step: int) -> None:
        news.committed = step
        live.draw(step)

    saver = Saver(
        work,
        model,
        optimizer,
        rank=ranks.rank,
        parts=ranks.world if shard else 1,
        committed=committed,
    )
    try:
        _take(steps, saver, history, ranks, place.checkpoint_s)
    finally:
        over.set()
    if ranks.rank == 0:
        _put_result(settings["out"], model, history)
        live.end()


def _take(steps: Iterator[StepDone], saver: Saver, history: list[Row], ranks: Ranks, checkpoint_s: float) -> None:
    """Takes all steps and saves in between, on all ranks after the same ones.

    ToldToEndError after saving, on all ranks, if one was told to end. Of a node that will be taken away it is not: its
    workers save at once, and train as long as they may.
    """
    saved, warned = time.monotonic(), False
    for done in steps:
        busy = saver.busy  # on every rank: it raises what went wrong
        due = ranks.rank == 0 and not busy and time.monotonic() - saved > checkpoint_s
        if not warned and node_will_go():
            due = warned = True
        wish = ranks.most(LEAVE if told_to_end.is_set() else SAVE if due else GO_ON)
        if wish == GO_ON or done.step == done.steps:
            continue
        saver.save(done.step, {"history": list(history)})
        saved = time.monotonic()
        if wish == LEAVE:
            saver.wait()
            raise ToldToEndError(
                f"a worker was told to end; step {done.step} is saved, and the same command goes on from there"
            )
    saver.wait()


def node_will_go() -> bool:
    """Whether Ray has heard that a node of this group is about to be taken away: a spot instance, `ray drain-node`.

    Ray's own `get_preemption_info` asks the first worker each time; our workers agree at the end of each step anyway.
    """
    return get_train_context().preemption_context.preemption_info is not None


def _heed_sigterm(worker: object) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: told_to_end.set())


def _resume_point(work: Dir) -> int:
    """The step to go on from, 0 for the beginning. What no later start may meet is deleted."""
    start = checkpoint.newest(work) or 0
    checkpoint.collect(work, start)
    kept = {name.partition("/")[0] for name in work.list("step-")}
    for folder in work.store.folders(f"{work.address}/{work.part}"):
        if folder.startswith("step-") and folder not in kept:
            work.delete(f"{folder}/{checkpoint.MANIFEST}")  # the folder of a first file that was never finished
    return start


def _told(steps: Iterator[StepDone], history: list[Row], observer: Observer) -> Iterator[StepDone]:
    """The same steps, kept in `history` and for the driver to hear."""
    for done in steps:
        history.append(observer.row(done))
        news.latest = history[-1]
        yield done


def _put_result(out: Dir, model: GPT, history: list[Row]) -> None:
    for name in [*out.list(), checkpoint.MODEL]:  # of a worker that was lost in the middle of this
        if name != TRACE:
            out.delete(name)
    checkpoint.save_model(out, model)
    out.put(STEPS, "".join(json.dumps(row) + "\n" for row in history).encode())
    out.put(EVENTS, event_file(history))


def _model(task: Fit, device: torch.device) -> GPT:
    if task.start is not None:
        model = checkpoint.load_model(task.start, torch.float32, device)
    else:
        model = GPT(task.model, task.vocab_size).reset(task.seed).to(device)
    model.dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    return model


def _summary(job: Job, task: Fit) -> dict[str, float]:
    """What the curve of the whole training says, restarts included."""
    with job.out.open(STEPS) as lines:
        rows = [json.loads(line) for line in lines]
    return summary(rows) | {"parameters": parameters(task.model, task.vocab_size), "waste": task.index.waste}
