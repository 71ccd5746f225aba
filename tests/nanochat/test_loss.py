"""The fused loss against the formula of its gradient and against autograd, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from nanochat.loss import CAP, nats, soft_cap, summed_nats

N, C, V = 37, 12, 50


def numbers(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(N, C, dtype=torch.float64, generator=generator) * 3  # some logits are well beyond the cap
    weight = torch.randn(V, C, dtype=torch.float64, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[5:11] = -1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def test_gradient_is_softmax_minus_one_hot_through_the_cap() -> None:
    hidden, weight, targets = numbers()
    summed_nats(hidden, weight, targets).backward()
    with torch.no_grad():
        raw = hidden @ weight.T
        capped = CAP * torch.tanh(raw / CAP)
        d_raw = (capped.softmax(1) - F.one_hot(targets.clamp(min=0), V)) * (1 - (capped / CAP) ** 2)
        d_raw[targets < 0] = 0
        torch.testing.assert_close(hidden.grad, d_raw @ weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(weight.grad, d_raw.T @ hidden, rtol=1e-10, atol=1e-12)


def test_gradient_agrees_with_autograd_and_is_scaled() -> None:
    hidden, weight, targets = numbers()
    (summed_nats(hidden, weight, targets) / 31).backward()
    ours = hidden.grad, weight.grad
    hidden, weight, targets = numbers()
    F.cross_entropy(soft_cap(hidden @ weight.T), targets, ignore_index=-1, reduction="sum").div(31).backward()
    for a, b in zip(ours, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000])
def test_the_chunk_changes_nothing_but_rounding(chunk: int) -> None:
    hidden, weight, targets = numbers()
    whole = summed_nats(hidden, weight, targets, chunk=N)
    whole.backward()
    again, weight_again, _ = numbers()
    parts = summed_nats(again, weight_again, targets, chunk=chunk)
    parts.backward()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(again.grad, hidden.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weight_again.grad, weight.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(nats(hidden, weight, targets, chunk=chunk).sum(), whole, rtol=1e-12, atol=0)


def test_nats_of_what_does_not_count_are_zero() -> None:
    hidden, weight, targets = numbers()
    expected = F.cross_entropy(soft_cap(hidden @ weight.T), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(nats(hidden, weight, targets), expected.detach(), rtol=1e-10, atol=1e-12)


def test_bf16_products_keep_an_fp32_softmax() -> None:
    hidden, weight, targets = numbers(torch.bfloat16)
    loss = summed_nats(hidden, weight.float(), targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = F.cross_entropy(soft_cap((hidden @ weight.T).float()), targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)


def test_logits_far_beyond_the_cap_stay_finite() -> None:
    hidden, weight = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0], [1.0]])
    costs = nats(hidden, weight, torch.tensor([0, 1]))
    assert costs.tolist() == pytest.approx([math.log(2), 2 * CAP + math.log(2)], rel=1e-6)
