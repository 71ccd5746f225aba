"""A better model per second: bits per byte of held-out text over the same wall clock, ours beside nanochat's way.

Both train the same model from the same weights with the same rates, each as many steps as its own speed allows in the
time; nanochat's way cuts documents by its own loader (cropping.py). Compiling, reading the shards and scoring are on
nobody's clock. The two take turns, a slice of the time each, so that a slow minute of the machine hits both.

    nanochat bench quality SHARDS [--minutes 10] [--plot FILE]     SHARDS: the folder of a `token_shards` artifact
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nanochat.bench.baseline import Baseline
from nanochat.bench.cropping import CroppingLoader
from nanochat.bench.measure import DTYPES, Measurement, best_precision, measurement, parse, parser, show, whole
from nanochat.bench.worker import Worker
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import TokenLoader, build_index, heldout_batches
from nanochat.eval.bits import bits_per_byte, sum_nats
from nanochat.files import Folder
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.tokenizer import Vocabulary
from nanochat.train import TrainPlan, train

WARM_UP, TIMED = 5, 25  # steps before the speed is measured, and of that measurement
SCORED_ROWS = 64  # of the held-out text, at each point of the curve; all of it at the end
OURS, THEIRS = "ours", "nanochat-like"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One side."""

    shards: Path
    heldout: Path  # the same folder, or another of the same vocabulary
    config: ModelConfig
    optim: OptimConfig
    precision: str
    device: str
    threads: int
    batch_tokens: int
    micro_batch: int
    seed: int
    baseline: bool = False


class Side:
    """Trains when asked, and is scored."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._setup, self._files = setup, Folder(setup.shards)
        names = self._files.list("train-")
        rows = setup.batch_tokens // setup.config.context
        if setup.baseline:
            self._cropping = CroppingLoader(
                self._files, names, setup.config.context, rows=rows, micro_batch=setup.micro_batch
            )
        else:
            index = build_index(self._files, names, setup.config.context, chat=False)
            self._loader = TokenLoader(
                self._files, index, batch_tokens=setup.batch_tokens, seed=setup.seed, micro_batch=setup.micro_batch
            )
        self._begin(WARM_UP + TIMED)
        self.run(WARM_UP)

    def plan(self, seconds: float) -> int:
        """Begins anew, with as many steps as fit the time, and does the first of them; returns how many.

        The first step is on nobody's clock: nanochat's way looks for its compiled code then.
        """
        fits = max(TIMED, round(seconds * TIMED / self.run(TIMED)))
        self._begin(fits)
        self.run(1)
        return fits

    def run(self, steps: int) -> float:
        """Does so many steps; the seconds they took."""
        began = time.perf_counter()
        for _ in range(steps):
            self.loss = next(self._steps)
        return time.perf_counter() - began

    def bits_per_byte(self, rows: int | None = None) -> float:
        """Of the first so many held-out rows; None: of all."""
        files, size = Folder(self._setup.heldout), self._setup.micro_batch
        batches = heldout_batches(files, heldout_names(self._setup), self._setup.config.context, size)
        nats, bytes_ = sum_nats(self._model, islice(batches, None if rows is None else -(-rows // size)))
        return bits_per_byte(nats, bytes_)

    def told(self) -> dict[str, Any]:
        """What the loader did with the text."""
        if not self._setup.baseline:
            return {}
        return {"dropped_share": self._cropping.dropped / (self._cropping.dropped + self._cropping.seen)}

    def _begin(self, steps: int) -> None:
        setup = self._setup
        size = Vocabulary.load(self._files).size
        self._model = GPT(setup.config, size, DTYPES[setup.precision]).reset(setup.seed).to(setup.device)
        self._steps = self._theirs(steps) if setup.baseline else self._ours(steps)

    def _ours(self, steps: int) -> Iterator[float]:
        setup = self._setup
        optimizer = build_optimizer(self._model, setup.optim, setup.precision)
        plan = TrainPlan(steps=steps, batch_tokens=setup.batch_tokens, optim=setup.optim)
        for done in train(self._model, optimizer, self._loader.step, plan):
            yield done.loss

    def _theirs(self, steps: int) -> Iterator[float]:
        baseline = Baseline(self._model, self._setup.optim, steps)
        for number in range(steps):
            yield baseline.step(number, self._cropping.step())


def heldout_names(setup: Setup) -> list[str]:
    """Shards to be scored on: what was held out, or all of a folder of its own."""
    files = Folder(setup.heldout)
    return files.list("heldout-") + (files.list("train-") if setup.heldout != setup.shards else [])


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `nanochat bench quality`."""
    options = parser("quality", "Bits per byte of held-out text after so many minutes, ours beside nanochat's way.")
    add = options.add_argument
    add(
        "shards",
        type=Path,
        metavar="SHARDS",
        help="folder of a `token_shards` artifact; `nanochat plan --json` says it",
    )
    add(
        "--heldout",
        type=Path,
        metavar="SHARDS",
        help="score on all shards of this folder, not on what SHARDS holds out",
    )
    add("--minutes", type=float, default=10.0, help="of training, each side (default: %(default)g)")
    add("--points", type=whole, default=10, help="of the curves; the sides take turns as often (default: %(default)s)")
    add("--depth", type=whole, default=4, help="layers, each 64 wide (default: %(default)s)")
    add("--context", type=whole, default=512, help="tokens of a row (default: %(default)s)")
    add("--batch-tokens", type=whole, default=4096, help="of a step (default: %(default)s)")
    add("--micro-batch", type=whole, default=8, help="rows at a time (default: %(default)s)")
    add("--precision", choices=tuple(DTYPES), help="(default: bf16 where the processor has it)")
    add("--seed", type=int, default=1337, help="of weights and batches (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="draw the curves, over seconds and over tokens")
    args = parse(options, argv)
    args.precision = args.precision or best_precision(args.device)
    try:
        ours = setup_of(args)
    except ValueError as error:
        options.error(str(error))
    if not Folder(args.shards).list("train-") or not heldout_names(ours):
        options.error(
            f"{args.shards} must hold train-*.parquet, and without --heldout heldout-*.parquet; give the folder "
            "of a token_shards artifact"
        )
    if not 0 < args.minutes < 1e5:
        options.error(f"--minutes is {args.minutes:g}; use a number above 0")
    rows = list(compared(args, ours))
    show(iter(rows), as_json=args.json)
    if args.plot:
        draw(rows[0].more, args.plot)
    return 0


def compared(args: argparse.Namespace, ours: Setup) -> Iterator[Measurement]:
    """One measurement: the share by which our bits per byte are below theirs."""
    curves: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    more: dict[str, Any] = {}
    with Worker(Side, ours) as mine, Worker(Side, replace(ours, baseline=True)) as theirs:
        sides = {OURS: mine, THEIRS: theirs}
        steps = {name: side.ask("plan", 60 * args.minutes) for name, side in sides.items()}
        done, seconds = dict.fromkeys(sides, 1), dict.fromkeys(sides, 0.0)
        for point in range(1, args.points + 1):
            for name, side in sides.items():
                slice_ = max(0, steps[name] * point // args.points - done[name])
                seconds[name] += side.ask("run", slice_)
                done[name] += slice_
                bits = side.ask("bits_per_byte", SCORED_ROWS)
                tokens = done[name] * args.batch_tokens
                curves[name].append({"seconds": seconds[name], "tokens": tokens, "bits_per_byte": bits})
        final = {name: side.ask("bits_per_byte") for name, side in sides.items()}
        more = {"curves": curves, "seconds": seconds, "steps": steps, **theirs.ask("told")}
    found = measurement("quality", _case(args), [final[OURS]], args, more, unit="bits/byte")
    below = {"below": 1 - final[OURS] / final[THEIRS]}
    yield replace(
        found, baseline=THEIRS, baseline_value=final[THEIRS], ratio=final[THEIRS] / final[OURS], more=found.more | below
    )


def setup_of(args: argparse.Namespace) -> Setup:
    """Our own side."""
    return Setup(
        shards=args.shards,
        heldout=args.heldout or args.shards,
        config=ModelConfig(depth=args.depth, context=args.context, head_dim=64),
        optim=OptimConfig(warmdown=0.4),
        precision=args.precision,
        device=args.device,
        threads=torch.get_num_threads(),
        batch_tokens=args.batch_tokens,
        micro_batch=args.micro_batch,
        seed=args.seed,
    )


def _case(args: argparse.Namespace) -> str:
    return f"depth {args.depth}, {args.minutes:g} minutes, context {args.context}, {args.precision}"


def draw(more: dict[str, Any], path: Path) -> None:
    """The curves as one picture; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, unit in zip(axes, ("seconds", "tokens"), (60, 1e6), strict=True):
        for side, points in more["curves"].items():
            axis.plot([p[name] / unit for p in points], [p["bits_per_byte"] for p in points], marker=".", label=side)
        axis.set(xlabel="minutes of training" if name == "seconds" else "million tokens")
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="bits per byte of held-out text")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
