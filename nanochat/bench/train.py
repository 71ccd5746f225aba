"""Training speed: tokens/s of whole steps (forward, backward, clip, optimizer) on random tokens.

No baseline yet: `baseline` and `ratio` are null until the issue on training speed brings one.

    nanochat bench train [--json]        or, where there is only torch: python -m nanochat.bench.train
"""

import argparse
from collections.abc import Sequence

import torch

from nanochat.bench.measure import (
    DTYPES,
    Measurement,
    best_precision,
    measurement,
    parse,
    parser,
    peak_bytes,
    show,
    whole,
)
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Batch
from nanochat.flops import parameters
from nanochat.model import GPT
from nanochat.optim import build_optimizer
from nanochat.train import TrainPlan, train

VOCABULARY, CONTEXT, BATCH_TOKENS = 8192, 512, 4096
WARM_UP = 3  # steps that are not counted


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `nanochat bench train`."""
    options = parser("train", "Tokens/s of training steps on random tokens.")
    options.add_argument("--precision", choices=tuple(DTYPES), help="(default: bf16 where the processor has it)")
    options.add_argument("--depth", type=whole, default=4, help="layers, each 64 wide (default: %(default)s)")
    options.add_argument("--steps", type=whole, default=20, help="steps that are timed (default: %(default)s)")
    args = parse(options, argv)
    args.precision = args.precision or best_precision(args.device)
    show([measure(args)], as_json=args.json)
    return 0


def measure(args: argparse.Namespace) -> Measurement:
    """Times `args.steps` steps, each by itself."""
    config = ModelConfig(depth=args.depth, context=CONTEXT, head_dim=64)
    rates = step_rates(config, args.steps, args.device, args.precision)
    more = {
        "parameters": parameters(config, VOCABULARY),
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "batch_tokens": BATCH_TOKENS,
        # Of a GPU's memory what torch handed out, else what the whole process had.
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_bytes(),
    }
    return measurement("train", f"depth {args.depth}", rates, args, more)


def step_rates(config: ModelConfig, steps: int, device: str, precision: str) -> list[float]:
    """tokens/s of each step after the warm-up.

    A step waits for the GPU once, before the optimizer; so on CUDA it is timed from that point of the step before.
    """
    model = GPT(config, VOCABULARY, DTYPES[precision]).reset(0).to(device)
    optim = OptimConfig()
    plan = TrainPlan(steps=WARM_UP + steps, batch_tokens=BATCH_TOKENS, optim=optim)
    optimizer = build_optimizer(model, optim, precision)
    return [done.tokens_per_s for done in train(model, optimizer, random_rows, plan)][WARM_UP:]


def random_rows(step: int) -> tuple[list[Batch], int]:
    """A loader of one micro-batch; the next token is as random as this one."""
    rows = torch.randint(
        VOCABULARY, (BATCH_TOKENS // CONTEXT, CONTEXT + 1), generator=torch.Generator().manual_seed(step)
    )
    return [Batch(rows[:, :-1], rows[:, 1:])], BATCH_TOKENS


if __name__ == "__main__":
    raise SystemExit(main())
