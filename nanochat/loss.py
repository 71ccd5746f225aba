"""Cross-entropy of soft-capped logits, fused with the head: the logits never exist as a whole.

Gradients are made in the forward pass, chunk by chunk, while a chunk's logits are at hand; backward only scales them.
The cap bounds the logits, so exp needs no maximum taken off first: sums stay below V e^15, well inside fp32.
"""

# N positions, C width, V vocabulary

from typing import Any

import torch
from torch import Tensor

from nanochat.products import mm, product

CAP = 15.0  # of the logits; at most about 80, or exp would overflow
CHUNK = 1024  # positions; at a vocabulary of 32,768 a chunk's fp32 logits take 128 MiB


def soft_cap(logits: Tensor) -> Tensor:
    """CAP * tanh(logits / CAP): like the logits near 0, never beyond the cap."""
    return CAP * torch.tanh(logits / CAP)


def summed_nats(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum of the nats of all targets that count, a scalar with a gradient.

    hidden (N, C), weight (V, C), targets (N,) int64 with -1 where nothing counts. Products are in hidden's dtype,
    softmax and sums in fp32 (float64 if hidden is).
    """
    total: Tensor = _SummedNats.apply(hidden, weight, targets, chunk)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def nats(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """(N,) nats of each target, 0 where it is -1, without a gradient; arguments as for `summed_nats`."""
    work = _Chunk(hidden, weight, min(chunk, len(targets)))
    return torch.cat([work.nats(*pair) for pair in zip(*_split(chunk, hidden, targets), strict=True)])


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        work = _Chunk(hidden, weight, min(chunk, len(targets)))
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        sums = []
        for h, t, d_h in zip(*_split(chunk, hidden, targets, d_hidden), strict=True):
            sums.append(work.nats(h, t).sum())
            d_logits = work.d_logits(t)
            mm(d_logits, work.weight, out=d_h)
            d_weight += product(d_logits.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        (scale,) = grads
        return d_hidden * scale.to(d_hidden.dtype), d_weight * scale, None, None


def _split(chunk: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [torch.split(tensor, chunk) for tensor in tensors]


class _Chunk:
    """Room for the logits of n positions, used chunk after chunk: on a CPU fresh memory costs more than the product."""

    def __init__(self, hidden: Tensor, weight: Tensor, n: int) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.weight = weight.to(hidden.dtype)
        self._low = hidden.new_empty(n, len(weight))
        self._tanh = hidden.new_empty(n, len(weight), dtype=wide)
        self._exp = hidden.new_empty(n, len(weight), dtype=wide)

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (n, C), targets (n,) -> nats (n,), 0 where the target is -1."""
        n = len(targets)
        tanh, exp = self._tanh[:n], self._exp[:n]
        tanh.copy_(mm(hidden, self.weight.T, out=self._low[:n])).div_(CAP).tanh_()
        torch.mul(tanh, CAP, out=exp).exp_()
        self._total = exp.sum(1)
        chosen = CAP * tanh.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        return (self._total.log() - chosen).masked_fill_(targets < 0, 0.0)

    def d_logits(self, targets: Tensor) -> Tensor:
        """Derivative of the nats just computed by the logits, (n, V) in hidden's dtype; overwrites them.

        (softmax - one hot) (1 - tanh^2); the softmax's divisor is applied last, to the whole row.
        """
        n = len(targets)
        tanh, exp, total = self._tanh[:n], self._exp[:n], self._total
        exp.scatter_add_(1, targets.clamp(min=0)[:, None], -total[:, None])
        exp.addcmul_(exp, tanh.square_(), value=-1)
        exp.mul_(((targets >= 0) / total)[:, None])
        return self._low[:n].copy_(exp)
