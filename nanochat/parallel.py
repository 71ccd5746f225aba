"""Sums and copies over the processes of a run: the only place that knows torch.distributed.

The caller (Ray Train, or a test) sets the process group up; a run of one process needs nothing from here.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's

# Replaces each tensor by its sum over all ranks, in place. Every rank must call it with the same shapes.
Reduce = Callable[[Sequence[Tensor]], None]


def sum_ranks(tensors: Sequence[Tensor]) -> None:
    """A `Reduce` over torch.distributed's default group.

    The result is the same on all ranks, bit for bit. Of two ranks it is a + b, exactly what one process that adds
    one after the other gets; with more the order of a ring's sums differs from it.
    """
    pending = []
    for tensor in tensors:
        flat = tensor.detach().view(-1)
        pending += [
            dist.all_reduce(part, async_op=True) for part in torch.split(flat, BUCKET_BYTES // flat.element_size())
        ]
    for work in pending:
        work.wait()


@torch.no_grad()
def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor on every rank by that of rank 0, in place."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)
