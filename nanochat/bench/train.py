"""Training speed: tokens/s of whole steps (forward, backward, clip, optimizer) on a language made of random numbers.

With `--against`, each side trains the same model on the same batches in a process of its own, and a few steps of one
are timed after a few of the other. The share of the machine's matrix products that a baseline reaches says whether it
is worth beating: what leaves three quarters of them unused is not.

    nanochat bench train [--against nanochat-like fp32]    or, where there is only torch: python -m nanochat.bench.train
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
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
LEAST_RUNS, STEPS = 5, 20
# What `--against` may name -> the precision in which nanochat would compute
BASELINES = {"nanochat-like": "bf16", "fp32": "fp32"}
TORCHRUN = "torchrun"  # the same loop without Ray, which only pipelines/bench/train.py can compare
TORCHRUN_RUNS, TORCHRUN_STEPS = 7, 16  # steps: of a run


def main(
    argv: Sequence[str] | None = None, torchrun: Callable[[argparse.Namespace], Iterator[Measurement]] | None = None
) -> int:
    """The verb `nanochat bench train`. torchrun: makes that comparison, where there is Ray."""
    options = parser("train", "Tokens/s of training steps on made-up text.")
    options.add_argument("--precision", choices=tuple(DTYPES), help="(default: bf16 where the processor has it)")
    options.add_argument("--depth", type=whole, default=4, help="layers, each 64 wide (default: %(default)s)")
    options.add_argument("--steps", type=whole, help=f"steps that are timed (default: {STEPS}; against "
        f"torchrun {TORCHRUN_RUNS * TORCHRUN_STEPS})")  # fmt: skip
    options.add_argument("--micro-batch", type=whole, default=8, help="rows at a time (default: %(default)s)")
    options.add_argument(
        "--against",
        nargs="+",
        default=[],
        choices=(*BASELINES, TORCHRUN),
        help="nanochat-like: as nanochat at its best (bf16, torch.compile, all logits); fp32: as it does on a CPU "
        "unless told otherwise; torchrun: Ray Train beside the same loop without Ray",
    )
    options.add_argument("--runs", type=whole, help=f"of each side, in turn (default: {LEAST_RUNS}; against torchrun "
        f"{TORCHRUN_RUNS})")  # fmt: skip
    args = parse(options, argv)
    by_torchrun = TORCHRUN in args.against
    if by_torchrun:
        _check_torchrun(options, args, torchrun is not None)
    args.runs = args.runs or (TORCHRUN_RUNS if by_torchrun else LEAST_RUNS)
    args.steps = args.steps or (args.runs * TORCHRUN_STEPS if by_torchrun else STEPS)
    if args.against and (args.runs < LEAST_RUNS or args.steps % args.runs):
        options.error(
            f"--steps {args.steps} --runs {args.runs}: a comparison needs at least {LEAST_RUNS} runs of equally many "
            f"steps; try --steps {LEAST_RUNS * max(1, args.steps // LEAST_RUNS)} --runs {LEAST_RUNS}"
        )
    args.precision = args.precision or best_precision(args.device)
    if torchrun is not None and by_torchrun:
        show(torchrun(args), as_json=args.json)
    else:
        show(compared(args) if args.against else [alone(args)], as_json=args.json)
    return 0


def _check_torchrun(options: argparse.ArgumentParser, args: argparse.Namespace, there: bool) -> None:
    """Exits with 2 where it cannot be compared."""
    wrong = {
        "it sets Ray beside the same loop without Ray, and needs the whole package: nanochat bench train "
        f"--against {TORCHRUN}": not there,
        "the other comparisons are made without Ray; ask for them alone": len(args.against) > 1,
        "it is about processes that share the cores of a machine; use --device cpu": args.device != "cpu",
        f"two workers share the threads, and --threads is {args.threads}; use an even number": args.threads % 2 > 0,
    }
    found = [words for words, is_wrong in wrong.items() if is_wrong]
    if found:
        options.error(f"--against {TORCHRUN}: {'; '.join(found)}")


def alone(args: argparse.Namespace) -> Measurement:
    """Times `args.steps` steps, each by itself."""
    with Worker(Trainer, setup_of(args)) as worker:
        rates = worker.ask("rates", args.steps)
        told = worker.ask("told")
        peak = worker.ask("mfu_peak_flops_per_s")
    mfu = statistics.median(rates) * flops_per_token(config_of(args), VOCABULARY) / peak
    more = {**about(args), **told, "peak_flops_per_s": peak, "mfu": mfu}
    return measurement("train", _case(args), rates, args, more)


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
            **about(args),
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
    per_token = flops_per_token(config_of(args), VOCABULARY)
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
        config=config_of(args),
        steps=WARM_UP + args.steps,
        precision=args.precision,
        device=args.device,
        threads=torch.get_num_threads(),
        micro_batch=args.micro_batch,
    )


def _case(args: argparse.Namespace) -> str:
    return f"depth {args.depth}, {args.precision}"


def config_of(args: argparse.Namespace) -> ModelConfig:
    """The model that is trained."""
    return ModelConfig(depth=args.depth, context=CONTEXT, head_dim=64)


def about(args: argparse.Namespace) -> dict[str, int]:
    """What decides a case."""
    return {
        "parameters": parameters(config_of(args), VOCABULARY),
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "batch_tokens": trainer.BATCH_TOKENS,
        "micro_batch": args.micro_batch,
        "steps": args.steps,
    }


if __name__ == "__main__":
    raise SystemExit(main())
