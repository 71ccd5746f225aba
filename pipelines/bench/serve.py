"""Speed of a service under load, from outside; beside the bare engine where the service is our own.

A closed loop says what the service can do, an open loop what its users wait for. Both sides get the same requests in
turn, in processes of their own.

    nanochat bench serve [URL] [--json]
"""

import argparse
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from nanochat.bench.measure import Measurement, measurement, parse
from nanochat.bench.worker import Worker
from pipelines.bench.asked import Asked, Load, poisson
from pipelines.bench.bare import Bare, BareSetup
from pipelines.bench.load import Client, Target
from pipelines.bench.options import options, settle
from pipelines.bench.outcome import Outcome, Slo, summary
from pipelines.bench.target import Limits, TargetError, own_bundle, probe, served
from pipelines.bench.tell import tell
from pipelines.bench.trace import Fitted, fit, rate, read_trace, stretch
from pipelines.service.bundle import RefusedError

SERVICE, ENGINE = "service", "bare engine"
INTERRUPTED = 130


def main(argv: Sequence[str], prepare: Callable[[], None], address: str | None = None) -> int:
    """The verb `nanochat bench serve`.

    prepare: is called before Ray starts.  address: of a Ray cluster.
    """
    found = options()
    args = parse(found, argv)
    bench = Bench(args, prepare, address)
    try:
        settle(args)
        tell(bench.measure(), as_json=args.json)
    except (ValueError, OSError) as error:
        found.error(str(error))
    except (TargetError, RefusedError, RuntimeError, MemoryError) as error:
        return _say(f"{found.prog}: {error}", 1)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    return _say("interrupted; above is what there was", INTERRUPTED) if bench.interrupted else 0


@dataclass
class Bench:
    """What is measured, and by whom."""

    args: argparse.Namespace
    prepare: Callable[[], None]
    address: str | None
    sides: dict[str, Worker] = field(default_factory=dict)
    interrupted: bool = False

    def measure(self) -> Iterator[Measurement]:
        """A closed loop, an open one, or both."""
        args = self.args
        trace = read_trace(args.trace, args.minutes) if args.trace else None
        with ExitStack() as stack:
            limits = self._start(stack)
            fitted = _fit(args, trace, limits)
            asked = fitted.asked if fitted else (Asked(args.prompt, args.new),)
            self._warm_up(asked)
            capacity = 0.0
            if args.closed and not self.interrupted:
                outcomes = self._rounds(_closed_loads(args, asked))
                yield self._row(_closed_case(args), outcomes, {**_trace_words(fitted), "clients": args.clients})
                capacity = _tokens_per_s(outcomes[SERVICE])
                if args.plot and not args.open:
                    self._draw(_closed_case(args), outcomes)
            if args.open and not self.interrupted:
                yield from self._open(asked, fitted, capacity)

    def _open(self, asked: tuple[Asked, ...], fitted: Fitted | None, capacity: float) -> Iterator[Measurement]:
        """capacity: tokens/s, read and drawn, of the closed loop before; 0 if there was none."""
        args = self.args
        tokens = sum(one.prompt + one.new for one in asked) / len(asked)
        if args.load and not capacity:
            raise RuntimeError("no reply came while the capacity was measured, so there is no share of it to offer")
        if fitted:
            scale = rate(asked) * tokens / (args.load * capacity) if args.load else args.scale_time or 1.0
            loads = [Load(asked=stretch(asked, scale), shared=args.shared, seed=args.seed)]
            more = {**_trace_words(fitted), "time_scale": scale, "offered_requests_per_s": rate(loads[0].asked)}
            case = f"{asked[-1].at_s / 60:.3g} minutes of {args.trace.name.split('.')[0]}"
        else:
            per_s = args.load * capacity / tokens if args.load else args.rate
            count = args.requests or max(1, round(per_s * args.seconds))
            loads = [
                Load(asked=poisson(asked * count, per_s, seed), shared=args.shared, seed=seed)
                for seed in range(args.seed + 1000, args.seed + 1000 + args.runs)
            ]
            more = {"offered_requests_per_s": per_s}
            case = f"{per_s:.3g} requests/s, {args.prompt} + {args.new} tokens"
        if args.load:
            more |= {"load": args.load}
            case = f"load {args.load:g}, {case}"
        outcomes = self._rounds(loads, [SERVICE] if fitted else None)
        yield self._row(case, outcomes, more, open_loop=True)
        if args.plot:
            self._draw(case, outcomes)

    def _start(self, stack: ExitStack) -> Limits:
        """Finds or starts the service, and the processes that measure."""
        args = self.args
        if args.url:
            target, limits = probe(args)
        else:
            own = stack.enter_context(own_bundle(args))
            shape: dict[str, Any] = {"vocabulary": own.vocabulary, "temperature": args.temperature}
            setup = BareSetup(files=own.bundle.files, dtype=own.bundle.dtype, capacity=own.capacity, **shape)
            self.sides[ENGINE] = stack.enter_context(_quiet(lambda: Worker(Bare, setup)))
            self.prepare()
            url = stack.enter_context(served(own, self.address))
            target = Target(url=url, model=own.bundle.card.id, timeout_s=args.timeout, **shape)
            limits = Limits(args.config.context, None)
        self.sides[SERVICE] = stack.enter_context(_quiet(lambda: Worker(Client, target)))
        self.model = target.model
        return limits

    def _warm_up(self, asked: tuple[Asked, ...]) -> None:
        """A few short replies each, that are not counted."""
        short = tuple(replace(one, new=min(8, one.new)) for one in asked[: self.args.clients])
        load = Load(asked=short, clients=self.args.clients, requests=self.args.clients, seed=self.args.seed + 999_999)
        self._rounds([load])

    def _rounds(self, loads: Sequence[Load], names: Sequence[str] | None = None) -> dict[str, list[Outcome]]:
        """Each load by each side in turn: engine, service, engine, service. Ends early at Ctrl-C."""
        found: dict[str, list[Outcome]] = {name: [] for name in names or self.sides}
        with self._heard():
            for load in loads:
                for name in found:
                    if not self.interrupted:
                        found[name].append(self.sides[name].ask("run", load))
        return found

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Ctrl-C ends the load that runs, and what it has measured is kept; a second one ends everything."""
        pids = [side.ask("pid") for side in self.sides.values()]

        def end(signum: int, frame: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            for pid in pids:
                os.kill(pid, signal.SIGINT)

        before = signal.signal(signal.SIGINT, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _row(
        self, case: str, outcomes: dict[str, list[Outcome]], more: dict[str, Any], *, open_loop: bool = False
    ) -> Measurement:
        """Of a closed loop the tokens/s, of an open one the median time to the first token."""
        args = self.args
        slo = Slo(args.slo_ttft / 1000, args.slo_tpot / 1000)
        mine = outcomes[SERVICE]
        if not any(outcome.good for outcome in mine):
            raise RuntimeError(_nothing(case, mine, interrupted=self.interrupted))
        told = {"url": args.url, "model": self.model, "loop": "open" if open_loop else "closed", **more}
        told |= summary(mine, slo)
        value: Callable[[Outcome], float] = _median_ttft_s if open_loop else lambda outcome: outcome.tokens_per_s
        values = [value(outcome) for outcome in mine if outcome.good]
        row = measurement("serve", case, values, args, told, unit="s" if open_loop else "tokens/s")
        theirs = [outcome for outcome in outcomes.get(ENGINE, []) if outcome.good]
        if theirs:
            engine = summary(theirs, slo)
            row.more["engine"] = engine
            row = row.against(ENGINE, [value(outcome) for outcome in theirs])
            if open_loop:
                row.more["added_ttft_s"] = {p: told["ttft_s"][p] - engine["ttft_s"][p] for p in ("p50", "p90", "p99")}
                row = replace(row, ratio=None)
        return row

    def _draw(self, case: str, outcomes: dict[str, list[Outcome]]) -> None:
        from pipelines.bench.plot import draw

        sides = {name: outcomes[name] for name in (SERVICE, ENGINE) if any(o.good for o in outcomes.get(name, []))}
        draw(f"{self.model}: {case}", sides, self.args.plot)


def _fit(args: argparse.Namespace, trace: tuple[Asked, ...] | None, limits: Limits) -> Fitted | None:
    """The trace with lengths that the service takes; None without a trace. ValueError where lengths do not fit."""
    if trace is not None:
        context = limits.context or 2048
        return fit(trace, context, min(limits.most_new or context, context - 1), args.scale_tokens)
    if limits.context is not None and args.prompt + args.new > limits.context:
        raise ValueError(
            f"--prompt {args.prompt} and --new {args.new} are more than the {limits.context} tokens of the model's "
            "context; use less"
        )
    if limits.most_new is not None and args.new > limits.most_new:
        raise ValueError(f"--new is {args.new}, but the service's replies have {limits.most_new} tokens at most")
    return None


def _closed_loads(args: argparse.Namespace, asked: tuple[Asked, ...]) -> list[Load]:
    """A trace's lengths come in another order, so that few of them stand for all."""
    mixed = tuple(random.Random(args.seed).sample(asked, len(asked)))
    return [
        Load(
            asked=mixed,
            clients=args.clients,
            seconds=args.seconds,
            requests=args.requests,
            shared=args.shared,
            seed=args.seed + run,
        )
        for run in range(args.runs)
    ]


def _closed_case(args: argparse.Namespace) -> str:
    lengths = f"lengths of {args.trace.name.split('.')[0]}" if args.trace else f"{args.prompt} + {args.new} tokens"
    return f"{args.clients} {'client' if args.clients == 1 else 'clients'}, {lengths}"


def _trace_words(fitted: Fitted | None) -> dict[str, Any]:
    return {} if fitted is None else {"token_scale": fitted.scale, "cut_requests": fitted.cut}


def _tokens_per_s(outcomes: Sequence[Outcome]) -> float:
    """Read and drawn."""
    found = summary(outcomes, Slo(1, 1))
    return float(found["reply_tokens_per_s"] + found["prompt_tokens_per_s"])


def _median_ttft_s(outcome: Outcome) -> float:
    waits = sorted(reply.ttft_s for reply in outcome.good)
    middle = len(waits) // 2
    return (waits[middle] + waits[~middle]) / 2


def _nothing(case: str, outcomes: Sequence[Outcome], *, interrupted: bool) -> str:
    """Why there is nothing to tell."""
    wrong = [reply for outcome in outcomes for reply in outcome.replies if reply.wrong]
    if interrupted:
        return f"{case}: no reply had ended"
    if not wrong:
        return f"{case}: no reply ended within the run; give it more --seconds"
    return f"{case}: not one reply came; {len(wrong)} times an error, first {wrong[0].wrong}: {wrong[0].said}"


@contextmanager
def _quiet(start: Callable[[], Worker]) -> Iterator[Worker]:
    """A process that does not end at the Ctrl-C which its terminal sends it while it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker = start()
    finally:
        signal.signal(signal.SIGINT, before)
    with worker:
        yield worker


def _say(words: str, code: int) -> int:
    print(words, file=sys.stderr)
    return code
