"""Sums and copies over the processes of a run: the only place that knows torch.distributed.

The caller (Ray Train, or a test) sets the process group up, then makes its `Ranks`; a run of one process needs no
group. Buckets follow DistributedDataParallel (https://arxiv.org/abs/2006.15704).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

GPU_BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's
CPU_BUCKET_BYTES = 4 << 20  # docs/exchange.md

Pending = Callable[[], object]  # waits for what was started; on CUDA the device's queue waits, not the host


class Ranks:
    """The processes of a run. Every rank must make the same calls, in the same order and with the same shapes."""

    def __init__(self, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; in a world of {world} it must be from 0 to {world - 1}")
        self.rank, self.world = rank, world

    def start_sum(self, tensor: Tensor) -> Pending:
        """Replace a tensor by its sum over all ranks, in place, while the caller goes on.

        Neither read nor write it before the result was called. The sum is the same on all ranks, bit for bit. Of two
        ranks it is a + b, exactly what one process that adds one after the other gets; with more the order of a ring's
        sums differs from it.
        """
        if self.world == 1:
            return _nothing
        work = dist.all_reduce(tensor.detach().view(-1), async_op=True)
        assert work is not None, "this process is not in the group"
        wait: Pending = work.wait
        return wait

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor on every rank by that of rank 0, in place."""
        for wait in [self.start_copy(tensor, 0) for tensor in tensors]:
            wait()

    def start_copy(self, tensor: Tensor, source: int) -> Pending:
        """Replace a tensor by that of rank `source`, in place, while the caller goes on."""
        if self.world == 1:
            return _nothing
        work = dist.broadcast(tensor.detach(), src=source, async_op=True)
        assert work is not None, "this process is not in the group"
        wait: Pending = work.wait
        return wait

    def most(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.world == 1:
            return value
        device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
        one = torch.tensor([value], dtype=torch.float64, device=device)
        dist.all_reduce(one, op=dist.ReduceOp.MAX)
        return float(one)


class Exchange:
    """Sums a gradient over ranks, bucket by bucket, while the backward pass that makes it still runs.

    A backward pass goes from a model's end to its beginning, and so do the buckets. They are started in that order
    whatever becomes final first, since all ranks must start the same.
    """

    def __init__(
        self, gradient: Tensor, weights: Sequence[nn.Parameter], ranks: Ranks, bucket_bytes: int | None = None
    ) -> None:
        """gradient: flat, that of `weights` one after the other; they are named in the order of their use."""
        least = bucket_bytes or (GPU_BUCKET_BYTES if gradient.is_cuda else CPU_BUCKET_BYTES)
        self._ranks = ranks
        self._buckets: list[Tensor] = []
        self._sizes: list[int] = []  # weights in each bucket
        self._place: dict[nn.Parameter, int] = {}  # the bucket of each weight
        begin = end = gradient.numel()
        for weight in reversed(weights):
            begin -= weight.numel()
            self._place[weight] = len(self._buckets)
            if begin == 0 or (end - begin) * gradient.element_size() >= least:
                self._buckets.append(gradient[begin:end])
                self._sizes.append(len(self._place) - sum(self._sizes))
                end = begin
        assert begin == 0, "the gradient is not that of these weights"
        self._open = list(self._sizes)  # weights of each bucket that are not final
        self._pending: list[Pending] = []

    def final(self, weight: nn.Parameter) -> None:
        """Nothing more is added to this weight's gradient in this step."""
        self._open[self._place[weight]] -= 1
        while len(self._pending) < len(self._buckets) and self._open[len(self._pending)] == 0:
            self._start()

    def finish(self, *more: Tensor) -> None:
        """The sums of the whole gradient and of `more` are there; a rank without rows calls only this."""
        while len(self._pending) < len(self._buckets):
            self._start()
        self._pending += [self._ranks.start_sum(tensor) for tensor in more]
        for wait in self._pending:
            wait()
        self._pending.clear()
        self._open = list(self._sizes)

    def _start(self) -> None:
        self._pending.append(self._ranks.start_sum(self._buckets[len(self._pending)]))


def _nothing() -> None:
    """Of one process nothing has to be waited for."""
