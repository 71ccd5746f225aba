"""Replicas that come and go: load steps in shares of what all of them can serve, and what those let in wait.

nanochat bench scale [--depth 12] [--shares 0.05 0.7 0.05] [--json]
"""

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nanochat.bench.measure import Measurement, at_least, measurement, parse, parser, whole
from nanochat.bench.worker import Worker
from pipelines.bench.asked import Asked, Load, poisson
from pipelines.bench.load import Client, Target
from pipelines.bench.options import model_options, positive, settle_model
from pipelines.bench.outcome import Outcome, Slo, shares, summary
from pipelines.bench.target import Own, own_bundle, served
from pipelines.bench.tell import tell

SETTLE_S = 30.0  # after a step in which waits are not counted: a replica has to come
FULL_S = 20.0  # for which it is measured what the replicas can serve
IDLE = 30  # requests, one after the other
LEAVE_S = 120.0  # within which the last replica too many has to be gone
LOOK_EVERY_S = 1.0


def main(argv: Sequence[str], prepare: Callable[[], None], address: str | None = None) -> int:
    """The verb `nanochat bench scale`.

    prepare: is called before Ray starts.  address: of a Ray cluster.
    """
    found = parser(
        "scale",
        "A service that may have 1 to --replicas replicas, under Poisson arrivals of changing rate: how many replicas "
        "there are over time, what is refused, and what those let in wait for a first token beside an idle service. "
        "What all replicas, and one alone, can serve is measured first.",
    )
    add = found.add_argument_group("the load").add_argument
    add("--shares", type=positive(2), nargs="+", default=[0.05, 0.7, 0.05], metavar="SHARE",
        help="steps of the load, of what all replicas can serve (default: 0.05 0.7 0.05)")  # fmt: skip
    add("--seconds", type=positive(), default=90.0, help="of a step (default: %(default)g)")
    add("--prompt", type=whole, default=128, help="tokens of a prompt (default: %(default)s)")
    add("--new", type=whole, default=64, help="tokens of a reply (default: %(default)s)")
    add("--max-wait", type=positive(), default=0.3, metavar="S",
        help="seconds for a first token; who would wait longer is refused (default: %(default)g)")  # fmt: skip
    add("--seed", type=at_least(0), default=0, help="of prompts and times (default: 0)")
    model_options(found)
    found.set_defaults(trace=None, clients=16, replicas=2)
    args = parse(found, argv)
    if args.seconds <= SETTLE_S or args.replicas < 2:
        found.error(f"--seconds must be over {SETTLE_S:g}, --replicas at least 2: there is nothing to see else")
    args.threads = max(1, args.threads // args.replicas)  # all of them together have --threads
    try:
        settle_model(args)
    except ValueError as error:
        found.error(str(error))
    prepare()
    tell(measure(args, address), as_json=args.json)
    return 0


def measure(args: argparse.Namespace, address: str | None) -> Iterator[Measurement]:
    """One measurement a step: the p99 of the time to the first token, beside that of the idle service."""
    with own_bundle(args) as own:
        most = args.replicas
        all_of_them, one = (_full(args, own, count, address) for count in (most, 1))
        own = replace(
            own, capacity=own.capacity.model_copy(update={"replicas": (1, most), "max_wait_s": args.max_wait})
        )
        with served(own, address) as url, Worker(Client, _target(own, url)) as client, _watching() as watch:
            _ask(client, Load(asked=_asked(args), clients=4, requests=16, seed=args.seed + 1))  # nothing is cold then
            idle = _ask(client, Load(asked=_asked(args), clients=1, requests=IDLE, seed=args.seed + 2))
            waits = np.array([reply.ttft_s for reply in idle.good])
            for number, share in enumerate(args.shares):
                watch.seen.clear()
                rate, began, before = share * all_of_them, time.monotonic(), _memory()
                asked = poisson(_asked(args) * max(1, round(rate * args.seconds)), rate, args.seed + 100 + number)
                outcome = _ask(client, Load(asked=asked, seed=args.seed + 200 + number))
                if number == len(args.shares) - 1:
                    watch.wait_for(1)
                told = {
                    **summary([outcome], Slo(1.0, 0.1)),
                    "share": share,
                    "offered_requests_per_s": rate,
                    "served_requests_per_s": {"all": all_of_them, "one": one},
                    "settled_ttft_s": shares(np.array([r.ttft_s for r in outcome.good if r.due_s > SETTLE_S])),
                    "idle_ttft_s": shares(waits),
                    "replicas": [(round(at - began, 1), count) for at, count in watch.changes()],
                    "memory_mb": {"before": before, "after": _memory()},
                }
                settled = told["settled_ttft_s"]
                case = f"step {number + 1}, load {share:g} of {most} replicas"
                values = [settled["p99"]] if settled else [float("nan")]
                row = measurement("scale", case, values, args, told, unit="s")
                yield row.against("idle service", [float(np.percentile(waits, 99))])


def _full(args: argparse.Namespace, own: Own, replicas: int, address: str | None) -> float:
    """Requests a second that so many replicas serve when they always have enough to do."""
    own = replace(own, capacity=own.capacity.model_copy(update={"replicas": (replicas, replicas)}))
    with served(own, address) as url, Worker(Client, _target(own, url)) as client:
        clients = own.capacity.max_batch * replicas
        _ask(client, Load(asked=_asked(args), clients=clients, requests=2 * clients, seed=args.seed + 3))
        outcome = _ask(client, Load(asked=_asked(args), clients=clients, seconds=FULL_S, seed=args.seed + 4))
        return outcome.requests_per_s


def _asked(args: argparse.Namespace) -> tuple[Asked, ...]:
    return (Asked(args.prompt, args.new),)


def _target(own: Own, url: str) -> Target:
    return Target(url=url, model=own.bundle.card.id, vocabulary=own.vocabulary)


def _ask(client: Worker, load: Load) -> Outcome:
    outcome: Outcome = client.ask("run", load)
    return outcome


@dataclass
class _Watch:
    """How many replicas run, as Serve says (its dashboard shows the same)."""

    seen: list[tuple[float, int]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        from ray import serve

        while not self.over.wait(LOOK_EVERY_S):
            for app in serve.status().applications.values():
                counts = [d.replica_states for name, d in app.deployments.items() if name.startswith("Replica")]
                running = sum(count for states in counts for state, count in states.items() if state == "RUNNING")
                self.seen.append((time.monotonic(), running))

    def changes(self) -> list[tuple[float, int]]:
        """When there were how many, where it changed."""
        seen = list(self.seen)
        return [now for before, now in zip([(0.0, -1), *seen], seen, strict=False) if before[1] != now[1]]

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + LEAVE_S
        while time.monotonic() < end and not (self.seen and self.seen[-1][1] == count):
            time.sleep(LOOK_EVERY_S)


@contextmanager
def _watching() -> Iterator[_Watch]:
    watch = _Watch()
    thread = threading.Thread(target=watch.look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def _memory() -> float:
    """MB that the service's processes on this machine hold, each by itself."""
    held = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            if (process / "cmdline").read_bytes().startswith(b"ray::"):
                held += int((process / "statm").read_text().split()[1]) * 4096
    return held / 1e6
