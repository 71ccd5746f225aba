"""What the benchmark of training runs in a process of its own: one side's steps, and what they cost."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.bench.baseline import Baseline
from nanochat.bench.measure import DTYPES, peak_bytes
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Batch
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.train import TrainPlan, train

VOCABULARY, CONTEXT, BATCH_TOKENS = 8192, 512, 4096
WARM_UP = 3  # steps that are not timed
FOLLOWERS = 64  # tokens that may come after a token
LAST = 20  # steps whose mean loss stands for the loss of a run
OPTIM = OptimConfig(warmdown=0.4)


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """One side of a comparison."""

    config: ModelConfig
    steps: int  # of the whole training, those that are not timed included
    precision: str
    device: str
    threads: int
    micro_batch: int  # rows
    baseline: bool = False


class Trainer:
    """Trains when asked, a few steps at a time."""

    def __init__(self, setup: TrainSetup) -> None:
        torch.set_num_threads(setup.threads)
        self._setup = setup
        self._model = GPT(setup.config, VOCABULARY, DTYPES[setup.precision]).reset(0).to(setup.device)
        self._text = Text(setup.micro_batch)
        self.losses: list[float] = []
        self._steps = self._baseline() if setup.baseline else self._ours()
        began = time.perf_counter()
        self.losses.append(next(self._steps))
        self._first_step_s = time.perf_counter() - began
        self.rates(WARM_UP - 1)

    def rates(self, steps: int) -> list[float]:
        """Does so many steps; tokens/s of each."""
        rates = []
        for number in range(len(self.losses), len(self.losses) + steps):
            self._text.step(number)  # a loader has the next batch ready, so making it up is not timed
            began = time.perf_counter()
            self.losses.append(next(self._steps))
            rates.append(BATCH_TOKENS / (time.perf_counter() - began))
        return rates

    def told(self) -> dict[str, float]:
        """What is known after the steps."""
        cuda = self._setup.device == "cuda"
        return {
            "loss": statistics.mean(self.losses[-LAST:]),
            "first_step_s": self._first_step_s,
            # Of a GPU's memory what torch handed out, else what the whole process had.
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak_bytes(),
        }

    def peak_flops_per_s(self, precision: str) -> float:
        """What a product of matrices reaches here, at best; in fp32 by the way that torch takes by itself."""
        best, size = 0.0, 1024  # larger ones are no faster, and would count as memory of training
        a, b = (torch.randn(size, size).to(self._setup.device, DTYPES[precision]) for _ in "ab")
        for _ in range(30):
            began = time.perf_counter()
            float((a @ b)[0, 0])  # waits for a GPU
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
        return best

    def _ours(self) -> Iterator[float]:
        """On CUDA a step is timed from the point where the one before waited for the GPU, before its optimizer."""
        plan = TrainPlan(steps=self._setup.steps, batch_tokens=BATCH_TOKENS, optim=OPTIM)
        optimizer = build_optimizer(self._model, OPTIM, self._setup.precision)
        for done in train(self._model, optimizer, self._text.step, plan):
            yield done.loss

    def _baseline(self) -> Iterator[float]:
        baseline = Baseline(self._model, OPTIM, self._setup.steps)
        for number in range(self._setup.steps):
            batches, _ = self._text.step(number)
            yield baseline.step(number, batches)


class Text:
    """A language with frequent tokens, in which each has few that may follow it: there is something to learn."""

    def __init__(self, micro_batch: int) -> None:
        self._micro_batch = micro_batch
        self._made: tuple[int, list[Batch]] | None = None
        draw = np.random.default_rng(0).random((VOCABULARY, FOLLOWERS))
        self._followers = (VOCABULARY * draw**4).astype(np.int64)

    def step(self, number: int) -> tuple[list[Batch], int]:
        """A loader, as `train` takes it; asked again for the same step, it has it."""
        if self._made is None or self._made[0] != number:
            self._made = number, self._make(number)
        return self._made[1], BATCH_TOKENS

    def _make(self, number: int) -> list[Batch]:
        draw = np.random.default_rng(1 + number)
        rows = BATCH_TOKENS // CONTEXT
        text = np.empty((CONTEXT + 1, rows), dtype=np.int64)
        text[0] = draw.integers(VOCABULARY, size=rows)
        choices = (FOLLOWERS * draw.random((CONTEXT, rows)) ** 3).astype(np.int64)
        for place, choice in enumerate(choices):
            text[place + 1] = self._followers[text[place], choice]
        parts = torch.split(torch.from_numpy(text.T.copy()), self._micro_batch)
        return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]
