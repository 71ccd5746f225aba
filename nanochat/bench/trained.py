"""A trained model in each precision: size of its matrices, bits per byte of held-out text, speed of one reply.

bf16, where it is among them, is what the others are compared with. int8 is made when the model is loaded.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack

from nanochat.bench.measure import Measurement, measurement
from nanochat.bench.ours import Ours
from nanochat.bench.setup import Load, Run, setup_of
from nanochat.bench.worker import Worker, in_turn
from nanochat.eval.bits import bits_per_byte
from nanochat.flops import parameters


def measure(args: argparse.Namespace) -> Iterator[Measurement]:
    """A row for each precision."""
    prompt = max(args.prompt, args.config.context - args.new)  # the cache must hold a row of text
    with ExitStack() as stack:
        setups = [setup_of(args, precision, prompt, args.new) for precision in args.precision]
        workers = [stack.enter_context(Worker(Ours, setup)) for setup in setups]
        scores = [worker.ask("bits", args.text, args.trained) for worker in workers]
        runs = in_turn(workers, lambda worker, number: _run(args, worker, number), args.runs + 1)
        told = [worker.ask("told") for worker in workers]
    rates = [[run.rate for run in found[1:]] for found in runs]  # the first is the warm-up
    bits = [bits_per_byte(*score) for score in scores]
    base = args.precision.index("bf16") if "bf16" in args.precision else None
    for number, precision in enumerate(args.precision):
        more = {
            "precision": precision,
            "parameters": parameters(args.config, args.vocabulary),
            "prompt_tokens": args.prompt,
            "new_tokens": args.new,
            "text_bytes": scores[number][1],
            "bits_per_byte": bits[number],
            "time_per_token_s": 1 / statistics.median(rates[number]),
            **told[number],
        }
        row = measurement("decode", f"trained, {precision}, batch 1", rates[number], args, more)
        if base is not None:
            row.more["bits_per_byte_of_bf16"] = bits[base]
            row.more["bits_per_byte_change"] = bits[number] / bits[base] - 1
            row.more["weight_bytes_of_bf16"] = told[base]["weight_bytes"]
            row = row.against("bf16", rates[base])
        yield row


def _run(args: argparse.Namespace, worker: Worker, number: int) -> Run:
    done: Run = worker.ask("decode", Load(1, args.prompt, args.new, seed=number))
    return done
