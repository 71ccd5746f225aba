"""Training speed: tokens/s of whole steps (forward, backward, clip, optimizer) on a language made of random numbers.

With `--against`, each side trains the same model on the same batches in a process of its own, and a few steps of one
are timed after a few of the other. The share of the machine's matrix products that a baseline reaches says whether it
is worth beating: what leaves three quarters of them unused is not.

    nanochat bench train [--against nanochat-like fp32]    or, where there is only torch: python -m nanochat.bench.train
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from nanochat.bench import trainer
from nanochat.bench.measure import (
    DTYPES,
    Measurement,
    best_precision,
    measurement,
    parse,
    parser,
    show,
    whole,
)
from nanochat.bench.trainer import CONTEXT, VOCABULARY, WARM_UP, Trainer, TrainSetup
from nanochat.bench.worker import Worker, in_turn
from nanochat.config import ModelConfig
from nanochat.flops import flops_per_token, parameters

FAIR = 0.25  # of the machine's matrix products that a baseline must reach
LEAST_RUNS = 5
# What `--against` may name -> the precision in which nanochat would compute
BASELINES = {"nanochat-like": "bf16", "fp32": "fp32"}


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `nanochat bench train`."""
    options = parser("train", "Tokens/s of training steps on made-up text.")
    options.add_argument("--precision", choices=tuple(DTYPES), help="(default: bf16 where the processor has it)")
    options.add_argument("--depth", type=whole, default=4, help="layers, each 64 wide (default: %(default)s)")
    options.add_argument("--steps", type=whole, default=20, help="steps that are timed (default: %(default)s)")
    options.add_argument("--micro-batch", type=whole, default=8, help="rows at a time (default: %(default)s)")
    options.add_argument(
        "--against",
        nargs="+",
        default=[],
        choices=tuple(BASELINES),
        help="nanochat-like: as nanochat at its best (bf16, torch.compile, all logits); fp32: as it does on a CPU "
        "unless told otherwise",
    )
    options.add_argument("--runs", type=whole, default=LEAST_RUNS, help="of each side, in turn (default: %(default)s)")
    args = parse(options, argv)
    if args.against and (args.runs < LEAST_RUNS or args.steps % args.runs):
        options.error(
            f"--steps {args.steps} --runs {args.runs}: a comparison needs at least {LEAST_RUNS} runs of equally many "
            f"steps; try --steps {LEAST_RUNS * max(1, args.steps // LEAST_RUNS)} --runs {LEAST_RUNS}"
        )
    args.precision = args.precision or best_precision(args.device)
    show(compared(args) if args.against else [alone(args)], as_json=args.json)
    return 0


def alone(args: argparse.Namespace) -> Measurement:
    """Times `args.steps` steps, each by itself."""
    with Worker(Trainer, setup_of(args)) as worker:
        rates = worker.ask("rates", args.steps)
        told = worker.ask("told")
    return measurement("train", _case(args), rates, args, _more(args) | told)


def compared(args: argparse.Namespace) -> Iterator[Measurement]:
    """Ours beside each baseline: runs in turn, then what each ended with."""
    ours = setup_of(args)
    for name in args.against:
        setups = (ours, replace(ours, baseline=True, precision=BASELINES[name]))
        with Worker(Trainer, setups[0]) as mine, Worker(Trainer, setups[1]) as theirs:
            steps = args.steps // args.runs
            precisions = sorted({"bf16", BASELINES[name]})
            peaks = [[mine.ask("peak_flops_per_s", one) for one in precisions]]

            def rate(worker: Worker, _: int, steps: int = steps) -> float:
                rates: list[float] = worker.ask("rates", steps)
                return statistics.harmonic_mean(rates)

            found = in_turn((mine, theirs), rate, args.runs)
            peaks += [[mine.ask("peak_flops_per_s", one) for one in precisions]]
            told, other = mine.ask("told"), theirs.ask("told")
        more = {
            **_more(args),
            **told,
            **{f"baseline_{key}": value for key, value in other.items()},
            "baseline_min": min(found[1]),
            "baseline_max": max(found[1]),
            "peak_flops_per_s": dict(zip(precisions, map(max, *peaks), strict=True)),
        }
        one = measurement("train", _case(args), found[0], args, more).against(name, found[1])
        yield replace(one, more=one.more | _shares(one, args))


def _shares(found: Measurement, args: argparse.Namespace) -> dict[str, float]:
    """Of the peak that each side's products reach, and what is less than the baseline's."""
    more, peaks = found.more, found.more["peak_flops_per_s"]
    assert found.baseline is not None
    assert found.baseline_value is not None
    per_token = flops_per_token(_config(args), VOCABULARY)
    precision = BASELINES[found.baseline]
    share = found.baseline_value * per_token / peaks[precision]
    if share < FAIR:
        print(
            f"{found.baseline} reaches {share:.0%} of the {peaks[precision] / 1e9:.0f} GFLOP/s that {precision} "
            f"products reach here; under {FAIR:.0%} it is no fair baseline",
            file=sys.stderr,
        )
    return {
        "peak_share": found.value * per_token / peaks["bf16"],
        "baseline_peak_share": found.baseline_value * per_token / peaks["bf16"],
        "peak_bytes_ratio": more["peak_bytes"] / more["baseline_peak_bytes"],
        "loss_change": more["loss"] / more["baseline_loss"] - 1,
    }


def setup_of(args: argparse.Namespace) -> TrainSetup:
    """Our own side."""
    return TrainSetup(
        config=_config(args),
        steps=WARM_UP + args.steps,
        precision=args.precision,
        device=args.device,
        threads=torch.get_num_threads(),
        micro_batch=args.micro_batch,
    )


def _case(args: argparse.Namespace) -> str:
    return f"depth {args.depth}, {args.precision}"


def _config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(depth=args.depth, context=CONTEXT, head_dim=64)


def _more(args: argparse.Namespace) -> dict[str, int]:
    return {
        "parameters": parameters(_config(args), VOCABULARY),
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "batch_tokens": trainer.BATCH_TOKENS,
        "micro_batch": args.micro_batch,
        "steps": args.steps,
    }


if __name__ == "__main__":
    raise SystemExit(main())
