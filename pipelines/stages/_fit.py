"""A nanochat training loop handed to Ray Train: what pretrain and sft have in common.

The workers read their rows from the shards, write their own checkpoints, and say each step to a small actor that the
driver reads. `ray.train.report` is called once, at the end: Ray paces it by a poll of its controller, and what it
acknowledges can still be lost (docs/DECISIONS.md). What counts is the newest checkpoint that has its own manifest.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from nanochat import checkpoint
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Index, TokenLoader
from nanochat.flops import parameters
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.parallel import copy_from_first, sum_ranks
from nanochat.train import StepDone, TrainPlan, train
from pipelines.artifacts import Dir
from pipelines.runner import Job, Progress
from pipelines.spec import Place

STEPS = "steps.jsonl"  # one line a step, in the artifact
SAY_EVERY_S = 0.25
RAY_FILES = "ray-train"  # a folder beside work/ for what Ray Train writes for itself; of no use to us


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


class Board:
    """An actor: rank 0 says how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self.latest: StepDone | None = None

    def put(self, done: StepDone) -> None:
        """Keeps the newest step."""
        self.latest = done

    def read(self) -> StepDone | None:
        """The newest step, or None before the first."""
        return self.latest


def fit(job: Job, task: Fit) -> dict[str, float]:
    """Trains, and leaves config.json, model.safetensors and steps.jsonl in `job.out`. Returns the metrics."""
    place = job.step.place
    resources = {"CPU": place.cpus} | ({"GPU": 1} if place.gpu else {})
    with _watching(job) as board:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"task": task, "out": job.out, "work": job.work, "place": place, "board": board},
            torch_config=TorchConfig(backend="nccl" if place.gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=place.workers,
                use_gpu=place.gpu is not None,
                resources_per_worker=resources,
                accelerator_type=place.gpu,
            ),
            run_config=RunConfig(
                name=uuid.uuid4().hex[:8],  # never the same twice: Ray must not resume by itself
                storage_path=job.work.store.dir(job.step.address, RAY_FILES).uri(),
                failure_config=FailureConfig(max_failures=place.retries),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        trainer.fit()
    job.work.store.remove(job.step.address, RAY_FILES)
    return _summary(job, task)


@contextmanager
def _watching(job: Job) -> Iterator[Any]:
    """An actor for the workers to say their steps to; a thread passes them on to `job.say`."""
    board = ray.remote(num_cpus=0)(Board).remote()
    stop = threading.Event()

    def watch() -> None:
        said = 0
        while not stop.wait(SAY_EVERY_S):
            done = ray.get(board.read.remote())
            if done is not None and done.step != said:
                said = done.step
                numbers = {"train_loss": done.loss, "tokens_per_s": done.tokens_per_s}
                job.say(Progress(done=done.step, total=done.steps, unit="step", numbers=numbers))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        ray.kill(board)


def _work(settings: dict[str, Any]) -> None:
    """Runs in every worker, at every start and restart: goes on from the newest committed checkpoint."""
    task: Fit = settings["task"]
    work: Dir = settings["work"]
    place: Place = settings["place"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(place.cpus)
    device = torch.device("cuda", torch.cuda.current_device()) if place.gpu else torch.device("cpu")

    model = _model(task, device)
    optimizer = build_optimizer(model, task.optim, task.precision)
    loader = TokenLoader(
        task.shards,
        task.index,
        batch_tokens=task.batch_tokens,
        seed=task.seed,
        rank=rank,
        world=world,
        micro_batch=place.micro_batch,
    )
    start = checkpoint.newest(work) or 0
    history: list[dict[str, Any]] = checkpoint.restore(work, start, model, optimizer)["history"] if start else []
    if world > 1:
        copy_from_first(list(model.parameters()))  # one seed may draw other bits on another kind of processor
    plan = TrainPlan(steps=task.steps, batch_tokens=task.batch_tokens, optim=task.optim)
    saved = said = time.monotonic()
    for done in train(model, optimizer, loader.step, plan, start=start, reduce=sum_ranks if world > 1 else None):
        if rank:
            continue
        history.append(asdict(done))
        now = time.monotonic()
        if now - said > SAY_EVERY_S or done.step == task.steps:
            said = now
            settings["board"].put.remote(done)
        if now - saved > place.checkpoint_s and done.step < task.steps:
            checkpoint.save(work, done.step, model, optimizer, {"history": history})
            checkpoint.prune(work, keep=2)
            saved = time.monotonic()
    if rank == 0:
        out: Dir = settings["out"]
        checkpoint.save_model(out, model)
        out.put(STEPS, "".join(json.dumps(row) + "\n" for row in history).encode())
    ray.train.report({})


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
    rates = sorted(row["tokens_per_s"] for row in rows)
    tail = rows[-max(1, len(rows) // 20) :]
    return {
        "train_loss": sum(row["loss"] for row in tail) / len(tail),
        "tokens_per_s": rates[len(rates) // 2],
        "train_tokens": rows[-1]["tokens"],
        "train_steps": rows[-1]["step"],
        "parameters": parameters(task.model, task.vocab_size),
        "waste": task.index.waste,
    }
