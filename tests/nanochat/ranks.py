"""What each process of test_parallel.py runs: the same training on one, two, three or four ranks.

A module of its own, because spawned processes import it.
"""

import datetime
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from nanochat.config import OptimConfig
from nanochat.data import Batch
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.parallel import Pending, Ranks
from nanochat.train import Loader, TrainPlan, train
from tests.nanochat.sizes import VOCAB, small

CONTEXT = 128


@dataclass(frozen=True)
class Case:
    """One training. Its rows are split over `world` ranks, each taking `micro` rows at a time."""

    name: str
    world: int
    rows: int  # of a global batch
    micro: int
    chat: bool = False  # most targets are masked, unevenly, and rows have segments
    steps: int = 10
    device: Literal["cpu", "cuda"] = "cpu"  # cuda: one GPU a rank, and NCCL
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 on a CPU goes through nanochat/fast.py
    optim: Literal["muon", "adamw"] = "muon"
    shard: bool = False
    slow_s: float = 0.0  # that the last rank's batches take to come
    spoiled: tuple[int, float] | None = None  # the last rank's gradient of this step is multiplied by this number
    messages: bool = False  # as if one rank could share no memory with the others


class Noting(Ranks):
    """Notes the largest tensor that was sent."""

    largest = 0

    def start_sum(self, tensor: Tensor) -> Pending:
        self.largest = max(self.largest, tensor.numel())
        return super().start_sum(tensor)


def loader(case: Case, rank: int) -> Loader:
    """This rank's contiguous share of random rows, as even as can be; some ranks may get none."""

    def step(number: int) -> tuple[list[Batch], int]:
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(VOCAB, (case.rows, CONTEXT), generator=draw)
        targets = torch.randint(VOCAB, (case.rows, CONTEXT), generator=draw)
        segments = None
        if case.chat:
            targets[0, 5:] = -1  # 5 targets in the first row, 60 in the second, all in the others
            targets[1, :68] = -1
            segments = (torch.arange(CONTEXT) // 50 + 1).expand(case.rows, -1).int()
        if rank == case.world - 1:
            time.sleep(case.slow_s)
        begin, end = rank * case.rows // case.world, (rank + 1) * case.rows // case.world
        batches = [
            Batch(tokens[a:b], targets[a:b], None if segments is None else segments[a:b])
            for a, b in ((a, min(a + case.micro, end)) for a in range(begin, end, case.micro))
        ]
        return batches, int((targets >= 0).sum())

    return step


def spoil(model: GPT, step: Loader, at: int, by: float) -> Loader:
    """A loader in whose step `at` the head's gradient comes out multiplied; autograd's, not FastBackward's."""
    now = [-1]
    model.lm_head.weight.register_hook(lambda gradient: gradient * by if now[0] == at else gradient)

    def noted(number: int) -> tuple[list[Batch], int]:
        now[0] = number
        return step(number)

    return noted


def run(rank: int, cases: list[Case], folder: Path) -> None:
    """Every case that has a place for this rank; what it ended with goes to <folder>/<name>-<rank>.safetensors."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for case in cases:
        if rank < case.world:
            run_case(rank, case, folder)


def run_case(rank: int, case: Case, folder: Path) -> None:
    alone = case.world == 1
    if case.device == "cuda":
        torch.cuda.set_device(rank)
        torch.use_deterministic_algorithms(True)
    if not alone:
        meeting = (folder / f"{case.name}.meeting").as_uri()
        dist.init_process_group(
            "nccl" if case.device == "cuda" else "gloo",
            init_method=meeting,
            rank=rank,
            world_size=case.world,
            timeout=datetime.timedelta(seconds=60),
        )
    ranks = Noting(rank, case.world)
    optim = OptimConfig(name=case.optim, matrix_lr=0.01, embed_lr=0.02, warmdown=0.5)
    config = small(2, context=CONTEXT)
    if case.precision == "bf16":
        config = replace(config, head_dim=32, aspect=64)
    model = GPT(config, VOCAB).reset(1 if rank == 0 else 99).to(case.device)
    model.dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    ranks.copy_from_first(model.parameters())
    optimizer = build_optimizer(model, optim, case.precision, ranks, case.shard)
    plan = TrainPlan(steps=case.steps, batch_tokens=case.rows * CONTEXT, optim=optim)
    batches = loader(case, rank)
    if case.spoiled is not None and rank == case.world - 1:
        batches = spoil(model, batches, *case.spoiled)
    forbidden = patch("os.memfd_create", side_effect=PermissionError) if case.messages and rank == 1 else nullcontext()
    with forbidden:
        done = list(train(model, optimizer, batches, plan, ranks=None if alone else ranks))
    state = optimizer.state_dict()
    result = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    result["losses"] = torch.tensor([step.loss for step in done], dtype=torch.float64)
    save_file(result, folder / f"{case.name}-{rank}.safetensors")
    more = {f"optim/{name}": tensor.cpu().clone() for name, tensor in state.items()}
    more["kept_bytes"] = torch.tensor(kept_bytes(state.values()))
    more["skews"] = torch.tensor([step.skew_s for step in done])
    more["skipped"] = torch.tensor([step.skipped for step in done])
    more["largest"] = torch.tensor(ranks.largest)
    more["most"] = torch.tensor(ranks.most(float(rank)))
    save_file(more, folder / f"{case.name}-{rank}-more.safetensors")
    if not alone:
        dist.destroy_process_group()


def kept_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory that tensors hold, counted where it was allocated: a view holds all of what it looks into."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
