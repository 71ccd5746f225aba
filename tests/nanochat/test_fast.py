"""The step without autograd against autograd in fp32, and against closed forms; what makes it the same on all ranks."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat.checkpoint import Saver, restore
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Batch
from nanochat.fast import FastBackward
from nanochat.files import Folder
from nanochat.kernels import Kernels, able
from nanochat.loss import CAP
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.train import TrainPlan, backward, backward_of, flat_gradient, train

VOCAB = 61
BF16 = torch.bfloat16
OPTIM = OptimConfig(matrix_lr=0.01, embed_lr=0.02, warmdown=0.5)


def sized(kv_heads: int | None = None, *, context: int = 128, depth: int = 2) -> ModelConfig:
    """Four query heads of 32, the smallest that the kernels take."""
    return ModelConfig(depth=depth, context=context, head_dim=32, aspect=128 // depth, kv_heads=kv_heads)


def model_of(config: ModelConfig, dtype: torch.dtype = BF16) -> GPT:
    """Weights of the size that training leaves, none of them zero."""
    model = GPT(config, VOCAB, dtype)
    draw = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "embed" in name else weight.shape[1] ** -0.5, generator=draw)
    return model


def batch_of(rows: int, context: int, *, seed: int = 0, chat: bool = False) -> tuple[Batch, int]:
    """Random rows of which every fifth target, and of a chat most, do not count."""
    draw = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(VOCAB, (rows, context), generator=draw) for _ in "ab")
    targets[:, ::5] = -1
    segments = None
    if chat:
        targets[0, 7:] = -1
        segments = (torch.arange(context) // 50 + 1).int().expand(rows, -1).clone()
        segments[-1, -37:] = 0  # unused positions
    return Batch(tokens, targets, segments), int((targets >= 0).sum())


def gradients(model: GPT, add: Callable[[Batch, int], Tensor], *batches: Batch, count: int) -> tuple[float, Tensor]:
    """Sum of nats, and the gradient of all batches together."""
    flat = flat_gradient(model)
    nats = sum(float(add(batch, count)) for batch in batches)
    return nats, flat


CASES = [
    pytest.param(sized(), False, id="each key head its own"),
    pytest.param(sized(2), False, id="two query heads share a key head"),
    pytest.param(sized(1, context=384), False, id="one key head, and two blocks of queries"),
    pytest.param(sized(2, context=384), True, id="chats"),
    pytest.param(sized(2, context=640), True, id="chats too long to keep their chances"),
]


@pytest.mark.parametrize(("config", "chat"), CASES)
def test_it_is_as_near_to_fp32_as_autograd_in_bf16(config: ModelConfig, chat: bool) -> None:
    batch, count = batch_of(2, config.context, chat=chat)
    exact, same, ours = model_of(config, torch.float32), model_of(config), model_of(config)
    exact_nats, exact_gradient = gradients(exact, lambda *b: backward(exact, *b), batch, count=count)
    _, their_gradient = gradients(same, lambda *b: backward(same, *b), batch, count=count)
    nats, gradient = gradients(ours, FastBackward(ours, Kernels(1)), batch, count=count)
    assert nats == pytest.approx(exact_nats, rel=2e-3)  # bf16 has 8 bits; errors of many targets cancel
    at = 0
    for name, weight in exact.named_parameters():
        part = slice(at, at + weight.numel())
        at += weight.numel()
        size = exact_gradient[part].norm()
        error = float((gradient[part] - exact_gradient[part]).norm() / size)
        theirs = float((their_gradient[part] - exact_gradient[part]).norm() / size)
        assert error < 1.2 * theirs, name  # it rounds less often, but keys and values once for each block of queries
        assert theirs < 0.03, name


def test_cross_entropy_is_the_closed_form() -> None:
    """With a vocabulary that is no multiple of what the kernel takes at a time, and logits far beyond the cap."""
    rows, draw = 33, torch.Generator().manual_seed(5)
    raw = (torch.randn(rows, VOCAB, generator=draw) * 10).to(BF16)
    raw[3] = 1e4
    raw[4, ::2] = -1e4
    targets = torch.randint(VOCAB, (rows,), generator=draw)
    targets[5:11] = -1
    logits, nats, shares = raw.clone(), torch.empty(rows), torch.empty(rows)
    Kernels(1)("cross_entropy", logits, targets, nats, shares, rows, VOCAB)
    exact = raw.double().requires_grad_()
    capped = CAP * torch.tanh(exact / CAP)
    costs = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="none")
    (expected,) = torch.autograd.grad(costs.sum(), exact)
    torch.testing.assert_close(nats.double(), costs.detach(), rtol=1e-5, atol=1e-5)
    # bf16 has 8 bits; 1 - tanh^2 loses to rounding what is beyond 1e-6
    torch.testing.assert_close(logits.double() * shares.double()[:, None], expected, rtol=2**-8, atol=2e-6)
    assert not shares[5:11].any()


def test_a_certain_target_has_an_exact_gradient() -> None:
    """p - 1 where p is nearly 1: taken off before it is rounded."""
    raw = torch.full((1, VOCAB), -8.0, dtype=BF16)
    raw[0, 7] = 8.0
    logits, nats, shares = raw.clone(), torch.empty(1), torch.empty(1)
    Kernels(1)("cross_entropy", logits, torch.tensor([7]), nats, shares, 1, VOCAB)
    high, low = CAP * math.tanh(8 / CAP), -CAP * math.tanh(8 / CAP)
    rest = (VOCAB - 1) * math.exp(low - high)
    slope = 1 - math.tanh(8 / CAP) ** 2
    assert float(nats) == pytest.approx(math.log1p(rest), rel=1e-2)  # a difference of two numbers near 7.4 in fp32
    assert float(logits[0, 7] * shares) == pytest.approx(-rest / (1 + rest) * slope, rel=1e-2)


def test_micro_batches_add_up_bit_for_bit() -> None:
    """What two ranks sum is what one rank accumulates, whatever was computed before in the same memory."""
    model = model_of(sized(2))
    add = FastBackward(model, Kernels(1))
    (one, count), (two, _) = batch_of(5, 128, seed=1), batch_of(5, 128, seed=2, chat=True)
    first, second = (gradients(model, add, batch, count=count) for batch in (one, two))
    nats, both = gradients(model, add, one, two, count=count)
    assert torch.equal(both, first[1] + second[1])
    assert nats == first[0] + second[0]
    fresh = model_of(sized(2))
    assert torch.equal(gradients(fresh, FastBackward(fresh, Kernels(1)), two, count=count)[1], second[1])


def test_the_loops_have_the_same_bits_with_any_number_of_threads() -> None:
    config = sized(2)
    batch, count = batch_of(3, 128, chat=True)
    found = []
    for threads in (1, 3):
        model = model_of(config)
        found.append(gradients(model, FastBackward(model, Kernels(threads)), batch, count=count))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("path", ["best", "autograd"])
def test_each_weight_is_final_once_and_then_its_gradient_is(path: str) -> None:
    model = model_of(sized(2))
    flat = flat_gradient(model)
    add, names = backward_of(model, path), {weight: name for name, weight in model.named_parameters()}  # type: ignore[arg-type]
    (one, count), (two, _) = batch_of(3, 128, seed=1), batch_of(2, 128, seed=2)
    final: dict[str, Tensor] = {}

    def note(weight: torch.nn.Parameter) -> None:
        assert weight.grad is not None
        assert names[weight] not in final
        final[names[weight]] = weight.grad.clone()

    add(one, count)
    assert not final
    add(two, count, note)
    assert len(final) == len(names)
    assert next(iter(final)) == "lm_head.weight"
    assert next(reversed(final)) == "model.embed_tokens.weight"
    layers = [name.split(".")[2] for name in final if ".layers." in name]
    assert layers == sorted(layers, reverse=True)
    assert all(torch.equal(final[name], model.get_parameter(name).grad) for name in final)  # type: ignore[arg-type]
    note_again = final.copy()
    flat.zero_()
    add(one, count)
    assert final == note_again  # nobody is told who did not ask


def loader(number: int) -> tuple[list[Batch], int]:
    pairs = [batch_of(rows, 128, seed=10 * number + rows) for rows in (2, 1)]
    return [batch for batch, _ in pairs], sum(count for _, count in pairs)


def run(model: GPT, path: str = "best", steps: int = 6) -> list[float]:
    plan = TrainPlan(steps=steps, batch_tokens=3 * 128, optim=OPTIM, path=path)  # type: ignore[arg-type]
    return [done.loss for done in train(model, build_optimizer(model, OPTIM, "bf16"), loader, plan)]


def test_training_takes_it_unless_told_otherwise() -> None:
    ours, theirs = model_of(sized(2)), model_of(sized(2))
    losses, expected = run(ours), run(theirs, "autograd")
    assert losses != expected
    assert losses == pytest.approx(expected, rel=5e-3)
    assert losses == run(model_of(sized(2)))


def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    files, plan = Folder(tmp_path), TrainPlan(steps=6, batch_tokens=3 * 128, optim=OPTIM)
    whole = model_of(sized(2))
    optimizer = build_optimizer(whole, OPTIM, "bf16")
    losses, saver = [], Saver(files, whole, optimizer)
    for done in train(whole, optimizer, loader, plan):
        losses.append(done.loss)
        if done.step == 3:
            saver.save(3, {})
    saver.wait()
    resumed = GPT(sized(2), VOCAB, BF16)
    optimizer = build_optimizer(resumed, OPTIM, "bf16")
    restore(files, 3, resumed, optimizer)
    assert [done.loss for done in train(resumed, optimizer, loader, plan, start=3)] == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_without_a_compiler_autograd_trains_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(model_of(sized(2)), "autograd")
    monkeypatch.setenv("PATH", "")
    with pytest.warns(RuntimeWarning, match=r"slow path: no C\+\+ compiler.*install one") as warned:
        assert run(model_of(sized(2))) == expected
    assert len(warned) == 1


def test_what_the_kernels_cannot_do_goes_through_autograd() -> None:
    assert able(192, 64, BF16)
    assert not able(192, 64, torch.float32)
    assert not able(192, 48, BF16)  # half a head is no multiple of 16
    assert not able(100, 32, BF16)
    model = model_of(sized())
    odd = Batch(torch.ones(1, 20, dtype=torch.int64), torch.ones(1, 20, dtype=torch.int64))
    nats, gradient = gradients(model, backward_of(model, "best"), odd, count=20)
    expected = gradients(model, lambda *b: backward(model, *b), odd, count=20)
    assert nats == expected[0]
    assert torch.equal(gradient, expected[1])
