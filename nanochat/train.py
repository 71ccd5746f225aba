"""The training loop: takes batches, moves weights, yields what happened at every step.

A loss is (sum over the global batch) / (targets of the global batch that count), and that count is known before
backward; so neither accumulation nor the number of ranks changes it.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanochat.attention import Rows
from nanochat.config import OptimConfig
from nanochat.cpp import NoCompilerError
from nanochat.data import Batch
from nanochat.fast import FastBackward
from nanochat.kernels import LANES, Kernels, able
from nanochat.model import GPT
from nanochat.optim import Optimizer
from nanochat.parallel import Reduce
from nanochat.schedule import rate

# step (0-based) -> this rank's micro-batches, and how many targets count in the global batch
Loader = Callable[[int], tuple[list[Batch], int]]
# A micro-batch, and what its loss is divided by -> the sum of its nats; adds to the weights' gradients
Backward = Callable[[Batch, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How long a run is, and how its weights move."""

    steps: int
    batch_tokens: int  # positions of a global batch
    optim: OptimConfig
    path: Literal["best", "autograd"] = "best"  # see `backward_of`; both compute the same function


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """What one step of training did."""

    step: int  # steps done, so the first is 1
    steps: int
    loss: float  # nats per counted target of the global batch, before the weights moved
    grad_norm: float  # of the whole gradient, before clipping
    rate: float  # share of the full learning rate
    tokens: int  # positions of all global batches so far
    tokens_per_s: float
    seconds: float  # that the step took


def train(
    model: GPT, optimizer: Optimizer, loader: Loader, plan: TrainPlan, start: int = 0, reduce: Reduce | None = None
) -> Iterator[StepDone]:
    """Do the steps from `start` (0-based) to the end of the plan; the weights have moved when a step is yielded.

    reduce: sums tensors over ranks in place; None for a run of one process. All ranks must be given the same plan.
    FloatingPointError, on all ranks and before the weights move, if loss or gradient is not finite.
    """
    gradient = flat_gradient(model)
    add_gradient = backward_of(model, plan.path)
    for step in range(start, plan.steps):
        began = time.perf_counter()
        batches, count = loader(step)
        if count == 0:
            raise ValueError(f"step {step + 1}: no target of batch {step} counts, so it has no loss")
        nats = torch.zeros((), dtype=torch.float64, device=gradient.device)
        for batch in batches:
            nats += add_gradient(batch, count)
        if reduce is not None:
            reduce([gradient, nats])
        loss, grad_norm = clip(gradient, nats / count, plan.optim.clip)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"step {step + 1} of {plan.steps}, batch {step}: loss {loss}, gradient norm {grad_norm}; "
                "the weights are still those of the step before"
            )
        scale = rate(step, plan.steps, plan.optim)
        optimizer.step(scale)
        gradient.zero_()
        seconds = time.perf_counter() - began
        yield StepDone(
            step=step + 1,
            steps=plan.steps,
            loss=loss,
            grad_norm=grad_norm,
            rate=scale,
            tokens=(step + 1) * plan.batch_tokens,
            tokens_per_s=plan.batch_tokens / seconds,
            seconds=seconds,
        )


def backward_of(model: GPT, path: Literal["best", "autograd"]) -> Backward:
    """How micro-batches are computed.

    best: in bf16 on a CPU, by our own code (nanochat/fast.py), which takes two thirds of autograd's time and memory.
    It is compiled in seconds and kept, so even a short run gains. Elsewhere, and (with a warning) where there is no
    compiler, autograd. Like the processor and its threads, the path decides where numbers are rounded.
    """

    def by_autograd(batch: Batch, count: int) -> Tensor:
        return backward(model, batch, count)

    config = model.config
    if path == "autograd" or model.device.type != "cpu" or not able(config.width, config.head_dim, model.dtype):
        return by_autograd
    try:
        fast = FastBackward(model, Kernels(torch.get_num_threads()))
    except NoCompilerError as error:
        warnings.warn(f"training takes the slow path: {error}", RuntimeWarning, stacklevel=3)
        return by_autograd
    return lambda batch, count: (fast if batch.tokens.shape[1] % LANES == 0 else by_autograd)(batch, count)


def backward(model: GPT, batch: Batch, count: int) -> Tensor:
    """Add a micro-batch's share of the gradient to the weights' own; returns its sum of nats."""
    device = model.device
    segments = None if batch.segments is None else batch.segments.to(device)
    hidden = model(batch.tokens.to(device), Rows(segments))
    nats = model.loss(hidden, batch.targets.to(device))
    (nats / count).backward()  # type: ignore[no-untyped-call]
    return nats.detach()


def flat_gradient(model: GPT) -> Tensor:
    """One zeroed vector that all parameters' gradients are views of: summed, measured and clipped as one."""
    weights = list(model.parameters())
    flat = torch.zeros(sum(w.numel() for w in weights), dtype=weights[0].dtype, device=weights[0].device)
    for weight, part in zip(weights, torch.split(flat, [w.numel() for w in weights]), strict=True):
        weight.grad = part.view_as(weight)
    return flat


def clip(gradient: Tensor, loss: Tensor, largest: float) -> tuple[float, float]:
    """Scale the gradient so that its norm is at most `largest`; returns the loss and the norm it had."""
    norm = torch.linalg.vector_norm(gradient)
    gradient *= (largest / norm).clamp(max=1.0)
    both: list[float] = torch.stack((loss, norm.double())).tolist()  # one wait for the device
    return both[0], both[1]
