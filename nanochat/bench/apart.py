"""Beside the speed: from a process's start to its first token, a chat's turns, and how many replies others change."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanochat.bench.measure import Measurement, measurement
from nanochat.bench.ours import Ours
from nanochat.bench.setup import Load, RandomWeights, setup_of
from nanochat.bench.worker import Worker
from nanochat.checkpoint import CONFIG, MODEL, transformers_config
from nanochat.config import ModelConfig


def starts(args: argparse.Namespace) -> Iterator[Measurement]:
    """Seconds until the first token of `args.prompt` tokens: interpreter, imports, weights from a bf16 file, prefill.

    Caches are warm: one start goes before those that are timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not args.trained:
            write_random(args.config, args.vocabulary, Path(folder))
        for precision in args.precision:
            setup = setup_of(args, precision, args.prompt, 1)
            setup = replace(setup, folder=args.trained or Path(folder))
            seconds = []
            for number in range(args.runs + 1):
                began = time.perf_counter()
                with Worker(Ours, setup) as worker:
                    worker.ask("decode", Load(1, args.prompt, 0, seed=number))
                    seconds.append(time.perf_counter() - began)
                    told = worker.ask("told")
            more = {"precision": precision, "prompt_tokens": args.prompt, **told}
            case = f"depth {args.config.depth}, {precision}, start"
            yield measurement("decode", case, seconds[1:], args, more, unit="s")


def chats(args: argparse.Namespace) -> Iterator[Measurement]:
    """Seconds to the first token of a chat's last turn, beside those of its second."""
    for precision in args.precision:
        setup = setup_of(args, precision, args.turns * (args.prompt + args.new), 1)
        with Worker(Ours, setup) as worker:
            runs = [worker.ask("chat", args.turns, args.prompt, args.new, seed) for seed in range(args.runs + 1)][1:]
            told = worker.ask("told")
        by_turn = list(zip(*runs, strict=True))
        ttft = [statistics.median(first_s for first_s, _ in turn) for turn in by_turn]
        more = {
            "precision": precision,
            "turns": args.turns,
            "asked_tokens": args.prompt,
            "answered_tokens": args.new,
            "ttft_s": ttft,
            "computed_tokens": [computed for _, computed in runs[0]],
            **told,
        }
        case = f"depth {args.config.depth}, {precision}, turn {args.turns} of a chat"
        last = measurement("decode", case, [first_s for first_s, _ in by_turn[-1]], args, more, unit="s")
        yield last.against("turn 2", [first_s for first_s, _ in by_turn[1]])


def write_random(config: ModelConfig, vocab_size: int, folder: Path) -> None:
    """A bundle's config.json and model.safetensors with random weights."""
    weights = {name: weight.bfloat16() for name, weight in RandomWeights(config, vocab_size).items()}
    save_file(weights, folder / MODEL)
    told = transformers_config(config, vocab_size, torch.bfloat16)
    (folder / CONFIG).write_text(json.dumps(told))


def mixed(args: argparse.Namespace) -> Iterator[Measurement]:
    """Share of requests whose tokens differ from those they get alone, for the largest batch."""
    for precision in args.precision:
        setup = setup_of(args, precision, args.prompt, args.new, max(args.batch))
        with Worker(Ours, setup) as worker:
            share = worker.ask("differing", args.mixed, args.prompt, args.new)
            told = worker.ask("told")
        more = {
            "precision": precision,
            "requests": args.mixed,
            "batch": setup.batch,
            "longest_prompt_tokens": args.prompt,
            "new_tokens": args.new,
            "greedy": share["greedy"],
            "seeded": share["seeded"],
            **told,
        }
        case = f"depth {args.config.depth}, {precision}, other tokens"
        yield measurement("decode", case, [share["all"]], args, more, unit="share")
