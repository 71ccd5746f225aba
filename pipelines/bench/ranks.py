"""One rank of a training that is measured, whoever began its process: does steps when asked, and says how long it took.

torchrun ... -m pipelines.bench.ranks DOOR          without Ray; DOOR is the socket where it is asked
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client

import torch
import torch.distributed as dist

from nanochat.bench.measure import DTYPES
from nanochat.bench.trainer import BATCH_TOKENS, CONTEXT, OPTIM, VOCABULARY, Text
from nanochat.config import ModelConfig
from nanochat.data import Batch
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.parallel import Ranks
from nanochat.train import StepDone, TrainPlan, train


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What all ranks of a training are told."""

    config: ModelConfig
    precision: str
    threads: int  # of each rank
    micro_batch: int  # rows
    steps: int  # of the whole training
    shard: bool = False  # the optimizer's state


@dataclass(frozen=True)
class Hello:
    """The first word of a rank."""

    rank: int
    pid: int
    entered: float  # time.time() when its function began


@dataclass(frozen=True)
class Took:
    """What steps that were asked for cost."""

    seconds: float
    until: float  # time.time() at their end
    loss: float  # of the last


def serve(rank: int, world: int, door: str, say: Callable[[StepDone], None]) -> None:
    """Does as many steps as it is asked for, until it is asked for none. say: is told each step."""
    entered = time.time()
    with Client(door, "AF_UNIX") as link:
        link.send(Hello(rank, os.getpid(), entered))
        setup: RankSetup = link.recv()
        torch.set_num_threads(setup.threads)
        text = _Prepared(rank, world, setup.micro_batch)
        steps = _steps(setup, text, Ranks(rank, world) if world > 1 else None)
        done = 0
        while count := link.recv():
            text.prepare(done, count)
            began = time.perf_counter()
            for step in (next(steps) for _ in range(count)):
                say(step)
            link.send(Took(time.perf_counter() - began, time.time(), step.loss))
            done += count


class _Prepared:
    """The rows of one rank, made before a step is timed: a loader has the next batch ready."""

    def __init__(self, rank: int, world: int, micro_batch: int) -> None:
        self._rank, self._world = rank, world
        self._text = Text(min(micro_batch, BATCH_TOKENS // CONTEXT // world))
        self._batches: dict[int, list[Batch]] = {}

    def prepare(self, first: int, count: int) -> None:
        self._batches = {
            number: self._text.step(number)[0][self._rank :: self._world] for number in range(first, first + count)
        }

    def step(self, number: int) -> tuple[list[Batch], int]:
        """A loader, as `train` takes it."""
        return self._batches[number], BATCH_TOKENS


def _steps(setup: RankSetup, text: _Prepared, ranks: Ranks | None) -> Iterator[StepDone]:
    model = GPT(setup.config, VOCABULARY, DTYPES[setup.precision]).reset(0)
    optimizer = build_optimizer(model, OPTIM, setup.precision, ranks, setup.shard)
    plan = TrainPlan(steps=setup.steps, batch_tokens=BATCH_TOKENS, optim=OPTIM)
    yield from train(model, optimizer, text.step, plan, ranks=ranks)


def alone(door: str) -> None:
    """A process that torchrun began."""
    dist.init_process_group("gloo")
    serve(dist.get_rank(), dist.get_world_size(), door, lambda step: None)
    dist.destroy_process_group()


if __name__ == "__main__":
    from pipelines.bench import ranks  # what is pickled here must not be of `__main__`, which is another one there

    ranks.alone(sys.argv[1])
