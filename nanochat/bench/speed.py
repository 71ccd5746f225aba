"""Decode and prefill in tokens/s, beside the bandwidth bound and, where wanted, beside transformers.

Runs of the compared sides alternate, in processes of their own; the peer's four paths (dynamic and static cache, bf16
and fp32) are tried shortly first, and its best one for each case is the baseline.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from nanochat.bench.bound import Reader, step_bytes
from nanochat.bench.measure import Measurement, measurement
from nanochat.bench.ours import Ours
from nanochat.bench.setup import Load, Run, Setup, setup_of
from nanochat.bench.theirs import CACHES, PRECISIONS, CacheKind, Transformers
from nanochat.bench.worker import Worker, in_turn
from nanochat.engine.runner import Precision
from nanochat.flops import parameters

READ_BYTES = 1 << 30  # far more than any cache holds
BRIEF = 8  # steps of a path's trial, twice


@dataclass(frozen=True)
class Peer:
    """The baseline of a case: transformers by its best path."""

    path: tuple[CacheKind, Precision]
    tried: dict[str, float]  # tokens/s of each path


def batches(args: argparse.Namespace) -> Iterator[Measurement]:
    """A row for each batch and precision."""
    loads = [Load(batch, args.prompt, args.new, args.shared) for batch in args.batch]
    peers = _peers(args, loads, decode=True)
    for load, peer in zip(loads, peers, strict=True):
        setups = [setup_of(args, name, load.prompt, load.new, load.batch) for name in args.precision]
        with Worker(Reader, setups[0]) as reader:
            before = reader.ask("rates", READ_BYTES)
            found = list(_sides(args, setups, load, peer))
            after = reader.ask("rates", READ_BYTES)
        reads = {name: max(rates.get(name, 0.0) for rates in (before, after)) for name in before | after}
        of_bf16 = next((_rate(side.runs) for setup, side, _ in found if setup.precision == "bf16"), None)
        for setup, side, other in found:
            row = _decode_row(args, setup, load, side, other, reads)
            if of_bf16 is not None:
                row.more["times_bf16"] = row.value / of_bf16
            yield row


def prefill(args: argparse.Namespace) -> Iterator[Measurement]:
    """A row for each precision: one prompt, until its first token."""
    if not args.prefill:
        return
    load = Load(1, args.prefill, 1)
    [peer] = _peers(args, [load], decode=False)
    setups = [setup_of(args, name, load.prompt, load.new) for name in args.precision]
    for setup, side, other in _sides(args, setups, load, peer):
        rates = [load.prompt / run.first_s[0] for run in side.runs]
        more = _more(args, setup, side) | {
            "prompt_tokens": load.prompt,
            "ttft_s": statistics.median(run.first_s[0] for run in side.runs),
            **side.peak,
        }
        case = f"depth {args.config.depth}, {setup.precision}, prefill {load.prompt}"
        row = measurement("decode", case, rates, args, more | _beside(side, other))
        yield row if other is None else row.against(other.name, [load.prompt / run.first_s[0] for run in other.runs])


@dataclass(frozen=True)
class Side:
    """What one process did."""

    name: str
    runs: list[Run]
    told: dict[str, Any]
    peak: dict[str, int]


def _sides(
    args: argparse.Namespace, setups: Sequence[Setup], load: Load, peer: Peer | None
) -> Iterator[tuple[Setup, Side, Side | None]]:
    """Ours for each setup and what it is compared with, all measured in turn."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(Ours, setup)) for setup in setups]
        extra: list[tuple[str, ...]] = [() for _ in workers]
        if peer is not None:
            theirs = replace(setups[0], precision=peer.path[1])
            workers.append(stack.enter_context(Worker(Transformers, theirs)))
            extra.append((peer.path[0],))
        elif args.deterministic:
            free = [replace(setup, deterministic=False) for setup in setups]
            workers += [stack.enter_context(Worker(Ours, setup)) for setup in free]
            extra += [() for _ in free]
        of = dict(zip(workers, extra, strict=True))

        def run(worker: Worker, number: int) -> Run:
            done: Run = worker.ask("decode", replace(load, seed=number), *of[worker])
            return done

        in_turn(workers, run, 1)  # warm-up
        all_runs = in_turn(workers, lambda worker, number: run(worker, number + 1), args.runs)
        sides = [
            Side(worker.name, runs, worker.ask("told"), worker.ask("peak"))
            for worker, runs in zip(workers, all_runs, strict=True)
        ]
    for number, setup in enumerate(setups):
        other = None
        if peer is not None:
            told = {"path": f"{peer.path[0]} cache, {peer.path[1]}", "tried": peer.tried}
            other = replace(sides[-1], name="transformers", told=sides[-1].told | told)
        elif args.deterministic:
            other = replace(sides[len(setups) + number], name="not deterministic")
        yield setup, sides[number], other


def _peers(args: argparse.Namespace, loads: Sequence[Load], *, decode: bool) -> list[Peer | None]:
    """The peer's best path for each load."""
    if not args.against:
        return [None for _ in loads]
    tried: list[dict[tuple[CacheKind, Precision], float]] = [{} for _ in loads]
    for precision in PRECISIONS:
        with Worker(Transformers, setup_of(args, precision, loads[0].prompt, 1)) as worker:
            for load, rates in zip(loads, tried, strict=True):
                for cache in CACHES:
                    for _ in range(1 if decode else 2):  # the first prefill also warms up
                        found = worker.ask("brief", replace(load, new=BRIEF if decode else 1), cache)
                    rates[cache, precision] = found[1 if decode else 0]
    return [
        Peer(max(rates, key=rates.__getitem__), {f"{cache} {name}": rate for (cache, name), rate in rates.items()})
        for rates in tried
    ]


def _decode_row(
    args: argparse.Namespace, setup: Setup, load: Load, side: Side, other: Side | None, reads: dict[str, float]
) -> Measurement:
    runs = side.runs
    held = statistics.median(run.held for run in runs)
    must_read = step_bytes(setup, side.told["weight_bytes"], held, load.shared)
    best = max(reads.values())
    rates = [run.rate for run in runs]
    bound = load.batch * best / must_read
    more = _more(args, setup, side) | {
        "batch": load.batch,
        "prompt_tokens": load.prompt,
        "new_tokens": load.new,
        "shared_tokens": load.shared,
        "cached_share": sum(run.cached for run in runs) / (len(runs) * load.batch * load.prompt),
        "preemptions": sum(run.preempted for run in runs),
        "speculate": setup.speculate,
        **_times(load, runs),
        **side.peak,
        "text_tokens": held / load.batch,
        "step_bytes": must_read,
        "read_bytes_per_s": best,
        "read_kernels": reads,
        "bound_tokens_per_s": bound,
        "bound_share": _rate(runs) / bound,
    }
    if other is not None:
        more |= {f"baseline_{name}": value for name, value in _times(load, other.runs).items()}
    row = measurement(
        "decode",
        f"depth {args.config.depth}, {setup.precision}, batch {load.batch}",
        rates,
        args,
        more | _beside(side, other),
    )
    return row if other is None else row.against(other.name, [run.rate for run in other.runs])


def _rate(runs: Sequence[Run]) -> float:
    return statistics.median(run.rate for run in runs)


def _times(load: Load, runs: Sequence[Run]) -> dict[str, float]:
    return {
        "prefill_tokens_per_s": statistics.median(load.batch * load.prompt / max(run.first_s) for run in runs),
        "ttft_s": statistics.median(statistics.median(run.first_s) for run in runs),
        "time_per_token_s": statistics.median(run.seconds * load.batch / run.drawn for run in runs),
    }


def _more(args: argparse.Namespace, setup: Setup, side: Side) -> dict[str, Any]:
    return {
        "precision": setup.precision,
        "parameters": parameters(setup.config, setup.vocab_size),
        "vocabulary": setup.vocab_size,
        "key_heads": setup.config.key_heads,
        "step_tokens": args.step_tokens,
        **side.told,
    }


def _beside(side: Side, other: Side | None) -> dict[str, Any]:
    """What else is known of the baseline.

    same_first_tokens: share of requests whose first token is the same on both sides; rounding decides the rest.
    """
    if other is None:
        return {}
    shown = ("path", "tried", "version", "runner", "deterministic")
    told = {name: value for name, value in other.told.items() if name in shown}
    ours, theirs = ([token for run in one.runs for token in run.first] for one in (side, other))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return {f"baseline_{name}": value for name, value in (told | other.peak).items()} | {"same_first_tokens": same}
