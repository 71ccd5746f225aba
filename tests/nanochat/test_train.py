"""The loop: what it reports, what it normalises by, when it refuses."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.attention import Rows
from nanochat.config import OptimConfig
from nanochat.data import Batch
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.schedule import rate
from nanochat.train import StepDone, TrainPlan, train
from tests.nanochat.sizes import VOCAB, filled, small, some_tokens

OPTIM = OptimConfig(matrix_lr=0.01, embed_lr=0.02, warmdown=0.5, clip=0.3)
ROWS, LENGTH = 4, 32


def batches(number: int, parts: Sequence[int] = (4,)) -> tuple[list[Batch], int]:
    """Rows of step `number`, in micro-batches of these sizes; many targets do not count."""
    tokens, targets = some_tokens(ROWS, LENGTH, seed=number), some_tokens(ROWS, LENGTH, seed=1000 + number)
    targets[:, ::3] = -1
    targets[0] = -1
    targets[1, 5:] = -1  # so that micro-batches count differently many, and a mean of their means is wrong
    pairs = zip(torch.split(tokens, list(parts)), torch.split(targets, list(parts)), strict=True)
    return [Batch(a, b, None) for a, b in pairs], int((targets >= 0).sum())


def run(model: GPT, loader: Callable[[int], tuple[list[Batch], int]], steps: int, optim: OptimConfig = OPTIM):  # type: ignore[no-untyped-def]
    plan = TrainPlan(steps=steps, batch_tokens=ROWS * LENGTH, optim=optim)
    return train(model, build_optimizer(model, optim, "fp32"), loader, plan)


def slow_loss(model: GPT, number: int) -> Tensor:
    """Mean over the whole batch at once, by torch's own cross-entropy."""
    (batch,), _ = batches(number)
    logits = model.logits(model(batch.tokens, Rows()))
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)


def test_a_step_reports_loss_norm_rate_and_tokens() -> None:
    model, same = filled(small()), filled(small())
    loss = slow_loss(same, 0)
    loss.backward()
    norm = math.sqrt(sum(float(w.grad.double().square().sum()) for w in same.parameters() if w.grad is not None))
    first, second = run(model, lambda n: batches(n, (1, 1, 2)), steps=2)
    assert isinstance(first, StepDone)
    assert first.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert first.grad_norm == pytest.approx(norm, rel=1e-5)
    assert (first.step, second.step, second.steps) == (1, 2, 2)
    assert (first.rate, second.rate) == (rate(0, 2, OPTIM), rate(1, 2, OPTIM))
    assert (first.tokens, second.tokens) == (ROWS * LENGTH, 2 * ROWS * LENGTH)
    assert second.tokens_per_s == pytest.approx(ROWS * LENGTH / second.seconds)


def test_weights_move_as_by_one_clipped_batch() -> None:
    """The loop against: whole batch, torch's loss, torch's clipping, then the same optimizer."""
    model, same = filled(small()), filled(small())
    optimizer = build_optimizer(same, OPTIM, "fp32")
    norms = []
    for number in range(3):
        same.zero_grad()
        slow_loss(same, number).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(same.parameters(), OPTIM.clip)))
        optimizer.step(rate(number, 3, OPTIM))
    assert min(norms) > OPTIM.clip  # clipping did something
    list(run(model, lambda n: batches(n, (2, 1, 1)), steps=3))
    for (name, a), b in zip(model.named_parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)  # AdamW divides by small gradients


def test_a_small_gradient_is_not_scaled_up() -> None:
    wide = OptimConfig(name="adamw", matrix_lr=1e-4, clip=1e6)
    narrow = OptimConfig(name="adamw", matrix_lr=1e-4, clip=1e9)
    a, b = filled(small()), filled(small())
    list(run(a, batches, 2, wide))
    list(run(b, batches, 2, narrow))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_weights_have_moved_when_a_step_is_yielded() -> None:
    model, before = filled(small()), filled(small())
    steps = run(model, batches, steps=2)
    next(steps)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_it_starts_where_it_is_told() -> None:
    seen: list[int] = []

    def loader(number: int) -> tuple[list[Batch], int]:
        seen.append(number)
        return batches(number)

    model = filled(small())
    plan = TrainPlan(steps=5, batch_tokens=ROWS * LENGTH, optim=OPTIM)
    done = list(train(model, build_optimizer(model, OPTIM, "fp32"), loader, plan, start=3))
    assert seen == [3, 4]
    assert [step.step for step in done] == [4, 5]


def test_it_learns() -> None:
    model = GPT(small(), VOCAB).reset(1)
    done = list(run(model, lambda _: batches(0), steps=30))
    assert done[0].loss == pytest.approx(math.log(VOCAB), abs=1e-5)  # a head of zeros knows nothing
    assert done[-1].loss < 0.5


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_weights_move(what: str) -> None:
    model = filled(small())
    if what == "weight":
        model.lm_head.weight.data[3, 3] = math.nan
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def reduce(tensors: Sequence[Tensor]) -> None:
        if what == "gradient":
            tensors[0][7] = math.inf  # as another rank may bring it

    plan = TrainPlan(steps=3, batch_tokens=ROWS * LENGTH, optim=OPTIM)
    steps = train(model, build_optimizer(model, OPTIM, "fp32"), batches, plan, start=1, reduce=reduce)
    with pytest.raises(FloatingPointError, match="step 2 of 3, batch 1"):
        next(steps)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) or what == "weight", name


def test_a_batch_without_targets_is_refused() -> None:
    tokens = some_tokens(1, LENGTH)
    nothing = [Batch(tokens, torch.full_like(tokens, -1), None)]
    with pytest.raises(ValueError, match="step 1: no target of batch 0 counts"):
        next(run(filled(small()), lambda _: (nothing, 0), steps=1))
