"""How much of the sums of gradients hides behind the backward pass: two ranks of one thread each, over gloo.

Four ways take turns: sums that begin during the backward pass, sums that all begin after it, sums in memory that both
ranks see (what training does on one machine), and a sum of one number instead of the gradient, which shows what waiting
for the slower rank costs by itself.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from nanochat.bench.measure import DTYPES, Measurement, measurement, parse, parser, show, whole
from nanochat.clock import Clock
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Batch
from nanochat.flops import parameters
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.parallel import Exchange, Ranks
from nanochat.shared import SharedExchange, shared_zeros
from nanochat.train import backward_of, clip, flat_gradient, move

WORLD = 2
VOCABULARY, CONTEXT, ROWS = 8192, 512, 4  # rows of each rank
WARM_UP = 2  # steps of each way
OVERLAP, AFTER, MEMORY, ONE_NUMBER = WAYS = ("during backward", "after backward", "shared memory", "one number")

# Of each way, one entry a run: seconds of a step, and of waiting on the rank that comes last and on that which comes
# first. The one that comes last waits for communication alone.
Times = dict[str, list[tuple[float, float, float]]]


class Steps:
    """One rank's training, a step at a time."""

    def __init__(self, rank: int, depth: int, precision: str, bucket_bytes: int | None) -> None:
        self._ranks = Ranks(rank, WORLD)
        model = GPT(config_of(depth), VOCABULARY, DTYPES[precision]).reset(0)
        gradients = shared_zeros(parameters(config_of(depth), VOCABULARY), self._ranks)
        assert gradients, "two processes of one machine should be able to share memory"
        self._gradient, self._clock = flat_gradient(model, gradients[rank]), Clock(model.device)
        self._memory = SharedExchange(gradients, self._ranks)
        self._exchange = Exchange(self._gradient, list(model.parameters()), self._ranks, bucket_bytes)
        self._add = backward_of(model, "best", self._clock.mark)
        self._optimizer = build_optimizer(model, OptimConfig(), precision)
        draw = torch.Generator().manual_seed(rank)
        tokens = torch.randint(VOCABULARY, (ROWS, CONTEXT + 1), generator=draw)
        self._batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def run(self, way: str, steps: int) -> tuple[float, float, float]:
        """Means over the steps; see `Times`."""
        seconds, last, first = zip(*(self._step(way) for _ in range(steps)), strict=True)
        return statistics.mean(seconds), statistics.mean(last), statistics.mean(first)

    def _step(self, way: str) -> tuple[float, float, float]:
        self._ranks.most(0)  # both begin together
        self._clock.begin()
        nats = self._add(self._batch, WORLD * ROWS * CONTEXT, self._exchange.final if way == OVERLAP else None)
        if way == ONE_NUMBER:
            self._ranks.start_sum(nats)()
        elif way == MEMORY:
            self._memory.finish(nats)
        else:
            self._exchange.finish(nats)
        self._clock.mark("exchange")
        clip(self._gradient, 1.0)
        move(self._optimizer, 0.1, self._clock)
        self._gradient.zero_()
        self._clock.mark("optimizer")
        parts = self._clock.end()
        waited = parts["exchange"]
        return sum(parts.values()), -self._ranks.most(-waited), self._ranks.most(waited)


def work(rank: int, folder: Path, depth: int, args: argparse.Namespace) -> None:
    """What each process runs; rank 0 leaves `Times` in <folder>/times."""
    torch.set_num_threads(args.threads)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # noqa: TID251 (gloo asks nowhere else which network to use)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=300),
    )
    steps = Steps(rank, depth, args.precision, args.bucket_mib and args.bucket_mib << 20)
    for way in WAYS:
        steps.run(way, WARM_UP)
    times: Times = {way: [] for way in WAYS}
    for number in range(args.runs):
        for way in WAYS if number % 2 else reversed(WAYS):
            times[way].append(steps.run(way, args.steps))
    if rank == 0:
        (folder / "times").write_text(json.dumps(times))
    dist.destroy_process_group()


def measured(args: argparse.Namespace) -> Iterator[Measurement]:
    """Seconds a step that the rank which comes last waits, by depth and way."""
    for depth in args.depth:
        with tempfile.TemporaryDirectory() as name:
            spawn(work, args=(Path(name), depth, args), nprocs=WORLD)  # type: ignore[no-untyped-call]
            times: Times = json.loads((Path(name) / "times").read_text())
        for way in WAYS:
            seconds, last, first = (list(column) for column in zip(*times[way], strict=True))
            more: dict[str, Any] = {
                "step_s": statistics.median(seconds),
                "first_waits_s": statistics.median(first),
                "gradient_bytes": 4 * parameters(config_of(depth), VOCABULARY),
                "ranks": WORLD,
                "steps": args.steps,
            }
            one = measurement("exchange", f"depth {depth}, sums {way}", last, args, more, unit="s")
            yield one.against(AFTER, [row[1] for row in times[AFTER]]) if way == OVERLAP else one


def config_of(depth: int) -> ModelConfig:
    """The model that is trained."""
    return ModelConfig(depth=depth, context=CONTEXT, head_dim=64)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print it."""
    options = parser("exchange", __doc__ or "")
    options.add_argument("--depth", type=whole, nargs="+", default=[4, 6], help="(default: 4 6)")
    options.add_argument("--precision", choices=tuple(DTYPES), default="bf16", help="(default: %(default)s)")
    options.add_argument("--runs", type=whole, default=7, help="of each way, in turn (default: %(default)s)")
    options.add_argument("--steps", type=whole, default=3, help="of each run (default: %(default)s)")
    options.add_argument("--bucket-mib", type=whole, help="least size of a bucket (default: as in training)")
    options.set_defaults(device="cpu", threads=1)
    args = parse(options, argv)
    if args.device != "cpu":
        options.error("--device: only the CPU's exchange, over gloo, is measured here")
    show(measured(args), as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
