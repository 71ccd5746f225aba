"""Matrix products of bf16 on a processor that has no bf16: through fp32, in which each of their terms is exact.

torch's own are made for processors that multiply bf16; on others they take 4 to 60 times as long as in fp32. Everywhere
else these functions are torch's. Like the processor's threads, which of the two it is decides where sums are rounded.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.machine import cpu_has_bf16


def through_fp32(x: Tensor) -> bool:
    """Whether products of such tensors are made in fp32 and rounded."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _has_bf16()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in x's dtype, with a gradient; weight: in fp32, rounded to that dtype first."""
    weight = weight.to(x.dtype)
    return F.linear(x.float(), weight.float()).to(x.dtype) if through_fp32(x) else F.linear(x, weight)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in a's dtype."""
    return (a.float() @ b.float()).to(a.dtype) if through_fp32(a) else a @ b


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b."""
    return out.copy_(a.float() @ b.float()) if through_fp32(a) else torch.mm(a, b, out=out)


def addmm(more: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = more + a b, rounded once."""
    if through_fp32(a):
        return out.copy_(torch.addmm(more.float(), a.float(), b.float()))
    return torch.addmm(more, a, b, out=out)


def bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b, matrix by matrix; out may be a part of something larger."""
    if through_fp32(a):
        return out.copy_(torch.bmm(a.float(), b.float()))
    return torch.bmm(a, b, out=out) if out.is_contiguous() else out.copy_(torch.bmm(a, b))


def add_bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out += a b, matrix by matrix, rounded once."""
    if through_fp32(a):
        return out.copy_(torch.baddbmm(out.float(), a.float(), b.float()))
    return out.baddbmm_(a, b)


@cache
def _has_bf16() -> bool:
    return cpu_has_bf16()
