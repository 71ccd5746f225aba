"""The training loop: takes batches, moves weights, yields what happened at every step.

A loss is (sum over the global batch) / (targets of the global batch that count), and that count is known before
backward; so neither accumulation nor the number of ranks changes it.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from nanochat.attention import Rows
from nanochat.clock import Clock
from nanochat.config import OptimConfig
from nanochat.cpp import NoCompilerError
from nanochat.data import Batch
from nanochat.fast import FastBackward, Final, Mark, ignore
from nanochat.kernels import LANES, Kernels, able
from nanochat.loss import CHUNK, summed_nats
from nanochat.model import GPT, Block, norm, rotary_table
from nanochat.optim import Optimizer
from nanochat.parallel import Exchange, Ranks
from nanochat.schedule import rate
from nanochat.shared import SharedExchange, shared_zeros

# step (0-based) -> this rank's micro-batches, and how many targets count in the global batch
Loader = Callable[[int], tuple[list[Batch], int]]
# A micro-batch -> the sum of its nats, with a gradient
Forward = Callable[[Batch], Tensor]
MOST_CHUNKS = 8  # of the loss where it is compiled: each is compiled by itself

Path = Literal["best", "compile", "autograd"]


class Backward(Protocol):
    """Adds a micro-batch's share of the gradient to the weights' own."""

    def __call__(self, batch: Batch, count: int, final: Final | None = None) -> Tensor:
        """The sum of the micro-batch's nats, which count for 1 / `count` each."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How long a run is, and how its weights move."""

    steps: int
    batch_tokens: int  # positions of a global batch
    optim: OptimConfig
    path: Path = "best"  # see `backward_of`; all compute the same function
    # Steps in all, not in a row, that may be left out because loss or gradient is not finite: a machine that fails at
    # every third step must stop the run too.
    most_skipped: int = 10


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """What one step of training did."""

    step: int  # steps done, so the first is 1
    steps: int
    loss: float  # nats per counted target of the global batch, before the weights moved; may be NaN or infinite
    grad_norm: float  # of the whole gradient, before clipping; if it or the loss is not finite, no weight has moved
    rate: float  # share of the full learning rate
    tokens: int  # positions of all global batches so far
    tokens_per_s: float
    seconds: float  # that the step took
    parts: dict[str, float]  # seconds by part, see nanochat/clock.py
    skew_s: float  # by which the slowest rank's own work took longer than the fastest's, in the step before
    skipped: int  # steps so far in which no weight has moved


def train(
    model: GPT, optimizer: Optimizer, loader: Loader, plan: TrainPlan, start: int = 0, ranks: Ranks | None = None
) -> Iterator[StepDone]:
    """Do the steps from `start` (0-based) to the end of the plan; the weights have moved when a step is yielded.

    ranks: the processes that share each batch; None for a run of one. All must be given the same plan.
    A step whose loss or gradient is not finite moves nothing, on no rank. FloatingPointError, on all ranks, when there
    were more of them than the plan allows.
    """
    ranks = ranks or Ranks(0, 1)
    (gradient, exchange), clock = exchanged_gradient(model, ranks), Clock(model.device)
    add_gradient = backward_of(model, plan.path, clock.mark)
    skipped = max(0, start - optimizer.steps)  # before a restart
    own_s = 0.0  # of the newest step, what this rank did not wait for others
    for step in range(start, plan.steps):
        began = time.perf_counter()
        clock.begin()
        batches, count = loader(step)
        if count == 0:
            raise ValueError(f"step {step + 1}: no target of batch {step} counts, so it has no loss")
        clock.mark("data")
        told = torch.zeros(1 + ranks.world, dtype=torch.float64, device=gradient.device)  # nats; each rank's own_s
        told[1 + ranks.rank] = own_s
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)  # before it every sum would have to be exchanged again
            told[0] += add_gradient(batch, count, exchange.final if last and ranks.world > 1 else None)
        exchange.finish(told)
        clock.mark("exchange")
        norm = clip(gradient, plan.optim.clip)
        nats, *works_s, grad_norm = torch.cat((told, norm.double().view(1))).tolist()  # one wait for the device
        loss = nats / count
        scale = rate(step, plan.steps, plan.optim)
        if math.isfinite(loss) and math.isfinite(grad_norm):  # of sums over all ranks, so all decide the same
            move(optimizer, scale, clock)
        else:
            skipped += 1
            _check_skipped(skipped, plan, step, f"loss {loss}, gradient norm {grad_norm}")
        gradient.zero_()
        clock.mark("optimizer")
        seconds = time.perf_counter() - began
        parts = clock.end()
        own_s = sum(time_s for part, time_s in parts.items() if part != "exchange")
        yield StepDone(
            step=step + 1,
            steps=plan.steps,
            loss=loss,
            grad_norm=grad_norm,
            rate=scale,
            tokens=(step + 1) * plan.batch_tokens,
            tokens_per_s=plan.batch_tokens / seconds,
            seconds=seconds,
            parts=parts,
            skew_s=max(works_s) - min(works_s),
            skipped=skipped,
        )


def move(optimizer: Optimizer, scale: float, clock: Clock) -> None:
    """One step of the optimizer; what a sharded one waits for is exchange."""
    optimizer.begin_step(scale)
    clock.mark("optimizer")
    optimizer.end_step()
    clock.mark("exchange")


def _check_skipped(skipped: int, plan: TrainPlan, step: int, what: str) -> None:
    if skipped > plan.most_skipped:
        raise FloatingPointError(
            f"step {step + 1} of {plan.steps}, batch {step}: {what}; no weight moved in this step, and in {skipped} "
            f"steps so far, but most_skipped is {plan.most_skipped}. Look at the batches of these steps, lower the "
            "learning rates, or go on from an earlier checkpoint"
        )


def backward_of(model: GPT, path: Path, mark: Mark = ignore) -> Backward:
    """How micro-batches are computed. mark: is told when "forward" is over, and when "backward" is.

    best: in bf16 on a CPU, by our own code (nanochat/fast.py), which takes two thirds of autograd's time and memory.
    It is compiled in seconds and kept, so even a short run gains. On CUDA, by torch.compile; this never ran yet.
    Elsewhere, and (with a warning) where there is no compiler, autograd. Like the processor and its threads, the path
    decides where numbers are rounded.
    """
    config, device = model.config, model.device.type
    if path == "compile" or (path == "best" and device == "cuda"):
        return partial(backward, model, mark=mark, forward=compiled(model))
    by_autograd = partial(backward, model, mark=mark)
    if path == "autograd" or device != "cpu" or not able(config.width, config.head_dim, model.dtype):
        return by_autograd
    try:
        fast = FastBackward(model, Kernels(torch.get_num_threads()), mark)
    except NoCompilerError as error:
        warnings.warn(f"training takes the slow path: {error}", RuntimeWarning, stacklevel=3)
        return by_autograd
    return lambda batch, count, final=None: (fast if batch.tokens.shape[1] % LANES == 0 else by_autograd)(
        batch, count, final
    )


def backward(
    model: GPT,
    batch: Batch,
    count: int,
    final: Final | None = None,
    mark: Mark = ignore,
    forward: Forward | None = None,
) -> Tensor:
    """Add a micro-batch's share of the gradient to the weights' own; returns its sum of nats."""
    nats = forward(batch) if forward else _nats(model, batch)
    mark("forward")  # with the head's gradient, which is made on the way
    hooks = [
        weight.register_post_accumulate_grad_hook(final)  # type: ignore[no-untyped-call]
        for weight in (model.parameters() if final else ())
    ]
    (nats / count).backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    mark("backward")
    return nats.detach()


def compiled(model: GPT) -> Forward:
    """The sum of a micro-batch's nats through torch.compile: one graph that all blocks share, and one for the loss.

    Not one for everything: a graph gives all its gradients at its end, and no exchange could begin before. torch keeps
    what it compiled on disk, so a later process begins in seconds.
    """
    device = model.device
    cos, sin = (table.to(device, model.dtype) for table in rotary_table(model.config.context, model.config.head_dim))
    layers: list[dict[str, Tensor]] = [dict(block.named_parameters()) for block in model.model.layers]
    with torch.device("meta"):
        block = Block(model.config, 0)  # takes each layer's weights in turn: of blocks, each would be compiled

    @torch.compile
    def through(weights: dict[str, Tensor], x: Tensor, angles: tuple[Tensor, Tensor], keys: Rows) -> Tensor:
        y: Tensor = functional_call(block, weights, (x, angles, keys))
        return y

    @torch.compile
    def first(tokens: Tensor) -> Tensor:
        return norm(model.model.embed_tokens(tokens).to(model.dtype))

    @torch.compile
    def last(x: Tensor, targets: Tensor) -> Tensor:
        chunk = max(CHUNK, targets.numel() // MOST_CHUNKS)
        return summed_nats(norm(x).flatten(0, -2), model.lm_head.weight, targets.flatten(), chunk)

    def forward(batch: Batch) -> Tensor:
        batch = batch.to(device)
        tokens = batch.tokens.shape[1]
        x, keys = first(batch.tokens), Rows(batch.segments)
        for weights in layers:
            x = through(weights, x, (cos[:tokens], sin[:tokens]), keys)
        return last(x, batch.targets)

    return forward


def _nats(model: GPT, batch: Batch) -> Tensor:
    batch = batch.to(model.device)
    return model.loss(model(batch.tokens, Rows(batch.segments)), batch.targets)


def exchanged_gradient(model: GPT, ranks: Ranks) -> tuple[Tensor, Exchange | SharedExchange]:
    """`flat_gradient`, and the quickest way in which these ranks can sum it."""
    weights = list(model.parameters())
    if ranks.world > 1 and model.device.type == "cpu":
        gradients = shared_zeros(sum(weight.numel() for weight in weights), ranks)
        if gradients:
            return flat_gradient(model, gradients[ranks.rank]), SharedExchange(gradients, ranks)
    gradient = flat_gradient(model)
    return gradient, Exchange(gradient, weights, ranks)


def flat_gradient(model: GPT, flat: Tensor | None = None) -> Tensor:
    """One zeroed vector that all parameters' gradients are views of: summed, measured and clipped as one.

    flat: zeros to be that vector.
    """
    weights = list(model.parameters())
    sizes = [weight.numel() for weight in weights]
    if flat is None:
        flat = torch.zeros(sum(sizes), dtype=weights[0].dtype, device=weights[0].device)
    for weight, part in zip(weights, torch.split(flat, sizes), strict=True):
        weight.grad = part.view_as(weight)
    return flat


def clip(gradient: Tensor, largest: float) -> Tensor:
    """Scale the gradient so that its norm is at most `largest`; returns the norm it had, a scalar."""
    norm: Tensor = torch.linalg.vector_norm(gradient)
    gradient *= (largest / norm).clamp(max=1.0)
    return norm
