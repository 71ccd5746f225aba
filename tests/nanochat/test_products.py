"""Products of bf16, torch's and those through fp32, against float64: one rounding of the sum, nothing else."""

import pytest
import torch
from torch import Tensor

from nanochat import products
from nanochat.optim import orthogonal
from nanochat.products import add_bmm, addmm, bmm, linear, mm, product, through_fp32

HALF_ULP = 2.0**-8  # of bf16, relative


@pytest.fixture(params=[True, False], ids=["processor with bf16", "without"], autouse=True)
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_has_bf16", lambda: request.param)
    return bool(request.param)


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=HALF_ULP, atol=1e-4)  # atol: of sums in fp32


def test_only_bf16_on_a_cpu_goes_through_fp32(has_bf16: bool) -> None:
    assert through_fp32(some(1, seed=1)) != has_bf16
    assert not through_fp32(torch.ones(1))
    assert not through_fp32(torch.ones(1, dtype=torch.bfloat16, device="meta"))


def test_products_are_rounded_once() -> None:
    a, b, more = some(48, 96, seed=1), some(96, 80, seed=2), some(48, 80, seed=3)
    exact, out = a.double() @ b.double(), torch.empty(48, 80, dtype=torch.bfloat16)
    assert_rounded_once(product(a, b), exact)
    assert mm(a, b, out) is out
    assert_rounded_once(out, exact)
    assert_rounded_once(addmm(more, a, b, out), exact + more.double())


def test_products_of_several_matrices_may_go_into_a_part() -> None:
    a, b, room = some(3, 16, 32, seed=1), some(3, 32, 16, seed=2), some(3, 40, 16, seed=3)
    exact, before, part = a.double() @ b.double(), room.double(), room[:, 8:24]
    bmm(a, b, part)
    assert_rounded_once(part, exact)
    first = part.double()
    add_bmm(a, b, part)
    assert_rounded_once(part, first + exact)
    assert torch.equal(room[:, :8].double(), before[:, :8])
    assert torch.equal(room[:, 24:].double(), before[:, 24:])


def test_a_linear_layer_rounds_its_weight_and_has_gradients() -> None:
    x, d_y = some(8, 32, seed=1).requires_grad_(), some(8, 16, seed=2)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = linear(x, weight)
    y.backward(d_y)  # type: ignore[no-untyped-call]
    rounded = weight.detach().bfloat16().double()
    assert_rounded_once(y.detach(), x.detach().double() @ rounded.T)
    assert x.grad is not None
    assert weight.grad is not None
    assert_rounded_once(x.grad, d_y.double() @ rounded)
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad.double(), d_y.double().T @ x.detach().double(), rtol=HALF_ULP, atol=1e-4)


def test_muons_iteration_keeps_the_dtype_and_flattens_singular_values() -> None:
    x = orthogonal(some(2, 24, 48, seed=1))
    assert x.dtype == torch.bfloat16
    values = torch.linalg.svdvals(x.double())
    assert 0.6 < values.min() < values.max() < 1.3
