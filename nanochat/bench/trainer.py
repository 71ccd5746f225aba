"""What the benchmark of training runs in a process of its own: one side's steps, and what they cost."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.bench.baseline import Baseline
from nanochat.bench.measure import DTYPES
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Batch
from nanochat.machine import measured_flops_per_s, peak_bytes, peak_flops_per_s
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
        self._setup, self._device = setup, torch.device(setup.device)
        self._model = GPT(setup.config, VOCABULARY, DTYPES[setup.precision]).reset(0).to(setup.device)
        self._text = Text(setup.micro_batch)
        self.losses: list[float] = []
        self._parts: defaultdict[str, float] = defaultdict(float)  # seconds of the steps that are timed, ours only
        self._steps = self._baseline() if setup.baseline else self._ours()
        began = time.perf_counter()
        self.losses.append(next(self._steps))
        self._first_step_s = time.perf_counter() - began
        self.rates(WARM_UP - 1)
        self._parts.clear()

    def rates(self, steps: int) -> list[float]:
        """Does so many steps; tokens/s of each."""
        rates = []
        for number in range(len(self.losses), len(self.losses) + steps):
            self._text.step(number)  # a loader has the next batch ready, so making it up is not timed
            began = time.perf_counter()
            self.losses.append(next(self._steps))
            rates.append(BATCH_TOKENS / (time.perf_counter() - began))
        return rates

    def told(self) -> dict[str, Any]:
        """What is known after the steps."""
        total = sum(self._parts.values())
        return {
            "loss": statistics.mean(self.losses[-LAST:]),
            "first_step_s": self._first_step_s,
            "peak_bytes": peak_bytes(self._device),
            **({"shares": {part: s / total for part, s in self._parts.items()}} if total else {}),
        }

    def mfu_peak_flops_per_s(self) -> float:
        """What the share that is reached is a share of: a GPU's by its maker, else measured."""
        return peak_flops_per_s(self._device, DTYPES[self._setup.precision])

    def peak_flops_per_s(self, precision: str) -> float:
        """What a product of matrices reaches here, at best; in fp32 by the way that torch takes by itself."""
        return measured_flops_per_s(self._device, DTYPES[precision])

    def _ours(self) -> Iterator[float]:
        """On CUDA a step is timed from the point where the one before waited for the GPU, before its optimizer."""
        plan = TrainPlan(steps=self._setup.steps, batch_tokens=BATCH_TOKENS, optim=OPTIM)
        optimizer = build_optimizer(self._model, OPTIM, self._setup.precision)
        for done in train(self._model, optimizer, self._text.step, plan):
            for part, seconds in done.parts.items():
                self._parts[part] += seconds
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
