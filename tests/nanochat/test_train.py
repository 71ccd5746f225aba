"""The loop: what it reports, what it normalises by, when it refuses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.attention import Rows
from nanochat.clock import PARTS
from nanochat.config import OptimConfig
from nanochat.data import Batch
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.parallel import Pending, Ranks
from nanochat.schedule import rate
from nanochat.train import Loader, StepDone, TrainPlan, backward_of, train
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


def spoiled(model: GPT, by: dict[int, float]) -> Loader:
    """A loader in whose steps the head's gradient comes out multiplied by a number."""
    now = [-1]
    model.lm_head.weight.register_hook(lambda gradient: gradient * by.get(now[0], 1.0))

    def loader(number: int) -> tuple[list[Batch], int]:
        now[0] = number
        return batches(number, (1, 3))

    return loader


@pytest.mark.parametrize("by", [math.nan, math.inf, 1e30])  # the last is finite, but its norm is not
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(by: float) -> None:
    model, same = filled(small()), filled(small())
    optimizer, other = build_optimizer(model, OPTIM, "fp32"), build_optimizer(same, OPTIM, "fp32")
    plan = TrainPlan(steps=5, batch_tokens=ROWS * LENGTH, optim=OPTIM)
    done = []
    for step in train(model, optimizer, spoiled(model, {1: by, 3: by}), plan):
        done.append(step)
        if step.step not in (2, 4):  # the same by hand, without the steps that are left out
            same.zero_grad()
            slow_loss(same, step.step - 1).backward()
            torch.nn.utils.clip_grad_norm_(same.parameters(), OPTIM.clip)
            other.step(rate(step.step - 1, 5, OPTIM))
        for (name, a), b in zip(model.named_parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=f"{name} after step {step.step}")
        for name, tensor in optimizer.state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)
    assert [step.skipped for step in done] == [0, 1, 1, 2, 2]
    assert [math.isfinite(step.grad_norm) for step in done] == [True, False, True, False, True]
    assert all(math.isfinite(step.loss) for step in done)


def test_too_many_steps_that_are_not_finite_stop_the_run() -> None:
    """Whether in a row or not; `start` and the optimizer's own count tell how many there were before a restart."""
    model = filled(small())
    optimizer = build_optimizer(model, OPTIM, "fp32")
    plan = TrainPlan(steps=20, batch_tokens=ROWS * LENGTH, optim=OPTIM, most_skipped=3)
    loader = spoiled(model, dict.fromkeys((2, 5, 6, 9, 11), math.nan))
    first = []
    for done in train(model, optimizer, loader, plan):
        first.append(done.skipped)
        if done.step == 6:
            break
    assert first == [0, 0, 1, 1, 1, 2]
    again = train(model, optimizer, loader, plan, start=6)
    assert [next(again).skipped for _ in range(3)] == [3, 3, 3]
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 10 of 20, batch 9: loss \d.*norm nan.* 4 steps.* is 3"):
        next(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


class Another(Ranks):
    """Of two ranks, one to whose loss the other adds infinity, and nothing to its gradient."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def start_sum(self, tensor: Tensor) -> Pending:
        if tensor.dtype == torch.float64:
            tensor[0] += math.inf
        return lambda: None

    def most(self, value: float) -> float:
        return 1.0  # it can share no memory


def test_a_loss_that_is_not_finite_is_left_out_too() -> None:
    model, before = filled(small()), filled(small())
    plan = TrainPlan(steps=3, batch_tokens=ROWS * LENGTH, optim=OPTIM, most_skipped=1)
    steps = train(model, build_optimizer(model, OPTIM, "fp32"), batches, plan, ranks=Another())
    first = next(steps)
    assert math.isinf(first.loss)
    assert math.isfinite(first.grad_norm)
    with pytest.raises(FloatingPointError, match="step 2 of 3, batch 1: loss inf"):
        next(steps)
    for (name, weight), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, other), name


class Slower(Ranks):
    """Of two ranks the first; the other says that every step takes it three seconds."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def start_sum(self, tensor: Tensor) -> Pending:
        if tensor.dtype == torch.float64:
            tensor[2] += 3.0
        return lambda: None

    def most(self, value: float) -> float:
        return 1.0  # it can share no memory


def test_skew_is_what_the_slowest_rank_did_longer_in_the_step_before() -> None:
    model = filled(small())
    plan = TrainPlan(steps=2, batch_tokens=ROWS * LENGTH, optim=OPTIM)
    first, second = train(model, build_optimizer(model, OPTIM, "fp32"), batches, plan, ranks=Slower())
    own = sum(first.parts.values()) - first.parts["exchange"]
    assert (first.skew_s, second.skew_s) == (3.0, pytest.approx(3.0 - own))
    assert [done.skew_s for done in run(filled(small()), batches, steps=2)] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bf16: nanochat/fast.py
def test_the_parts_of_a_step_add_up_to_it(dtype: torch.dtype) -> None:
    model = GPT(replace(small(), head_dim=32, aspect=64), VOCAB, dtype).reset(1)
    for done in run(model, lambda n: batches(n, (2, 2)), steps=3):
        assert done.parts.keys() == {*PARTS, "other"}
        assert all(done.parts[part] > 0 for part in ("data", "forward", "backward", "optimizer"))
        assert sum(done.parts.values()) == pytest.approx(done.seconds, rel=0.05, abs=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_compiled_training_is_the_same_function() -> None:
    """What CUDA takes, here on the CPU: other kernels, the same losses; with segments, and other numbers of rows."""

    def loader(number: int) -> tuple[list[Batch], int]:
        (one, two), count = batches(number, (3, 1))
        segments = (torch.arange(LENGTH) // 10).int().expand(1, -1).clone()
        return [one, Batch(two.tokens, two.targets, segments)], count

    losses = []
    for path in ("compile", "autograd"):
        model = filled(small(2))
        plan = TrainPlan(steps=6, batch_tokens=ROWS * LENGTH, optim=OPTIM, path=path)  # type: ignore[arg-type]
        losses.append([done.loss for done in train(model, build_optimizer(model, OPTIM, "fp32"), loader, plan)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][-1]
    names, final = {weight: name for name, weight in model.named_parameters()}, []
    (batch, _), count = loader(0)
    backward_of(model, "compile")(batch, count, lambda weight: final.append(names[weight]))
    layers = [name.split(".")[2] for name in final if ".layers." in name]
    assert (final[0], final[-1]) == ("lm_head.weight", "model.embed_tokens.weight")
    assert layers == sorted(layers, reverse=True)  # block by block, so that their sums can begin


def test_a_batch_without_targets_is_refused() -> None:
    tokens = some_tokens(1, LENGTH)
    nothing = [Batch(tokens, torch.full_like(tokens, -1), None)]
    with pytest.raises(ValueError, match="step 1: no target of batch 0 counts"):
        next(run(filled(small()), lambda _: (nothing, 0), steps=1))
