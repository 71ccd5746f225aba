"""The command line: reads arguments and environment, calls one function a verb, prints. Decides nothing.

Exit codes: 0 done, 1 a stage failed, 2 the file or the arguments are wrong, 3 it does not fit, 4 the store cannot be
used, 5 a source changed, 130 Ctrl-C.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.artifacts import BrokenArtifactError, LocalStore, Store, StoreError, open_store
from pipelines.gc import garbage
from pipelines.lease import StageHeld
from pipelines.load import Loaded, SpecError, load
from pipelines.look import Seen, alive, look, unknown
from pipelines.plan import Step, plan
from pipelines.provenance import made_by
from pipelines.ray_local import NoRayError, logical_cpus, prepare, ray_running
from pipelines.room import free_disk, free_memory, needs, shortage
from pipelines.runner import Options, SourceChanged, StageFailed, run
from pipelines.show import Bars, JsonLines, PlainLines, as_json, plan_json, plan_lines, status_json, status_lines
from pipelines.stages import STAGES

FAILED, WRONG, NO_ROOM, NO_STORE, SOURCE_CHANGED, INTERRUPTED = 1, 2, 3, 4, 5, 130
EXITS: dict[type[Exception], int] = {
    SpecError: WRONG,
    StoreError: NO_STORE,
    SourceChanged: SOURCE_CHANGED,
    BrokenArtifactError: FAILED,
    StageFailed: FAILED,
    StageHeld: FAILED,
    NoRayError: FAILED,
}


@dataclass(frozen=True)
class Asked:
    """A pipeline file that was read, its plan, and the rest of the arguments."""

    args: argparse.Namespace
    loaded: Loaded
    steps: list[Step]

    def store(self, *, quick: bool = False) -> Store:
        """Raises SpecError while the place is not written."""
        return open_store(self.loaded.filled().profile.store, self.loaded.base, quick=quick)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told to end is Ctrl-C from afar
    try:
        return int(args.verb(args))
    except tuple(EXITS) as error:
        said = str(error)
        if isinstance(error, BrokenArtifactError):
            command = f"nanochat run {args.file} --profile {args.profile} --rebuild {error.stage}"
            said = f"{error.problem}; rebuild it: {command}"
        if isinstance(error, StageFailed):
            said += "\nwhat it had done is kept; run the same again to go on from there"
        return _say(said, next(code for kind, code in EXITS.items() if isinstance(error, kind)))
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from here", INTERRUPTED)
    except BrokenPipeError:  # `nanochat plan | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanochat", description="A small language model's whole life from one file.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_, description=help_)
        sub.set_defaults(verb=function)
        return sub

    def with_file(name: str, function: Callable[[Asked], int], help_: str) -> argparse.ArgumentParser:
        sub = verb(name, partial(_with_file, function), help_)
        sub.add_argument("file", type=Path, metavar="FILE", help="a pipeline file, such as pipelines/speedrun.yaml")
        sub.add_argument("--profile", default="laptop", metavar="P", help="where to run it (default: %(default)s)")
        sub.add_argument(
            "--set", action="append", default=[], dest="sets", metavar="PATH=VALUE",
            help="change STAGE.FIELD, place.STAGE.FIELD, serve.FIELD or store; may be given several times",
        )  # fmt: skip
        if name in ("plan", "run", "status"):
            sub.add_argument("--only", metavar="S", help="this stage and what it builds on")
        return sub

    sub = with_file("plan", _plan, "steps, their state, what changed, where they run and whether they fit")
    sub.add_argument("--json", action="store_true")
    sub = with_file("run", _run, "build what is not built yet, here")
    sub.add_argument("--rebuild", action="append", default=[], metavar="S", help="make this stage anew")
    sub.add_argument("--wait", action="store_true", help="wait for another run that builds the same stage")
    sub.add_argument("--json", action="store_true", help="one JSON line a stage instead of progress")
    sub = with_file("status", _status, "what is built, running or lost, and how far it is")
    sub.add_argument("--json", action="store_true")
    sub = with_file("serve", _serve, "bring the chat service up here, or roll it out on the Ray at RAY_ADDRESS")
    sub.add_argument("--ask", action="append", default=[], metavar="QUESTION", help="ask it once it is up")
    sub.add_argument("--once", action="store_true", help="end when the questions are answered")
    sub.add_argument("--rollback", action="store_true", help="bring back the bundle before the last rollout")
    sub.add_argument("--stop", action="store_true", help="take down the service that is up on RAY_ADDRESS")
    sub = with_file("report", _report, "one self-contained HTML page: curves, scores, lineage, costs")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--out", type=Path, metavar="PATH", help="the page (default: NAME-PROFILE.html)")
    sub = with_file("gc", _gc, "list what nothing addresses any more")
    sub.add_argument("--yes", action="store_true", help="and delete it")
    sub = verb("chat", _chat, "talk to a running service in the terminal")
    sub.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8000", metavar="URL",
        help="its address (default: %(default)s); NANOCHAT_API_KEY holds the key where it wants one",
    )  # fmt: skip
    sub = verb("key", _key, "make a key for a service that wants keys (serve.keys)")
    sub.add_argument("name", metavar="NAME", help="who will use it")
    sub = verb("bench", _bench, "measure this machine; `nanochat bench train --help` shows the options")
    sub.add_argument("what", choices=("train", "decode", "quality", "serve", "scale"))
    sub.add_argument("options", nargs=argparse.REMAINDER, help="of the benchmark, such as --json")
    return parser


def _with_file(function: Callable[[Asked], int], args: argparse.Namespace) -> int:
    loaded = load(args.file, args.profile, args.sets)
    steps = plan(loaded, getattr(args, "only", None))
    return function(Asked(args, loaded, steps))


def _say(words: object, code: int) -> int:
    print(words, file=sys.stderr)
    return code


def _look(asked: Asked, steps: Sequence[Step], store: Store) -> list[Seen]:
    return look(steps, store, asked.loaded.pipeline.name, asked.loaded.base, STAGES)


def _plan(asked: Asked) -> int:
    loaded, steps = asked.loaded, asked.steps
    store = None if loaded.blanks else asked.store(quick=True)
    seen = unknown(steps, loaded.blanks[0]) if store is None else _look(asked, steps, store)
    if asked.args.json:
        print(as_json(plan_json(loaded.pipeline.name, loaded.profile_name, seen, needs(steps))))
    else:
        print("\n".join(plan_lines(seen)))
    changed = [s.why for s in seen if s.source_changed]
    if changed:
        return _say("\n".join(changed), SOURCE_CHANGED)
    short = _shortage(asked, seen, store)
    return _say(short, NO_ROOM) if short else 0


def _shortage(asked: Asked, seen: Sequence[Seen], store: Store | None) -> str | None:
    """What does not fit on this machine, where the plan runs on it."""
    if asked.loaded.profile.cluster is not None or os.environ.get("RAY_ADDRESS"):
        return None
    missing = [need for need, s in zip(needs(asked.steps), seen, strict=True) if s.state != "built"]
    disk = free_disk(store.root) if isinstance(store, LocalStore) else None
    return shortage(missing, free_memory(), disk)


def _run(asked: Asked) -> int:
    args, loaded, store = asked.args, asked.loaded, asked.store()
    for name in args.rebuild:
        if name not in {step.name for step in asked.steps}:
            raise SpecError(f"--rebuild: no stage {name!r} in this plan")
    seen = _look(asked, asked.steps, store)
    refused = [s.why for s in seen if s.state == "unknown"]
    if refused:
        raise StoreError(refused[0])
    for s in seen:
        if s.notice:
            print(f"{s.step.name}: {s.notice}", file=sys.stderr)
    short = _shortage(asked, seen, store)
    if short:
        return _say(short, NO_ROOM)
    prepare(os.environ, Path.home())
    options = Options(
        pipeline=loaded.pipeline.name,
        profile=loaded.profile_name,
        seed=loaded.pipeline.seed,
        base=loaded.base,
        rebuild=frozenset(args.rebuild),
        wait=args.wait,
        made=made_by(),
        around=partial(ray_running, os.environ.get("RAY_ADDRESS"), logical_cpus(asked.steps, loaded.profile.serve)),
    )
    if args.json:
        shown: JsonLines | Bars | PlainLines = JsonLines(sys.stdout)
    else:
        shown = Bars(sys.stdout) if sys.stdout.isatty() else PlainLines(sys.stdout)
    try:
        run(asked.steps, store, STAGES, options, shown)
    finally:
        shown.close()
    return 0


def _status(asked: Asked) -> int:
    store = asked.store(quick=True)
    live = alive(_look(asked, asked.steps, store), store)
    print(as_json(status_json(live)) if asked.args.json else "\n".join(status_lines(live)))
    return 0


def _serve(asked: Asked) -> int:
    from pipelines.service.deploy import Wish, serve

    args = asked.args
    prepare(os.environ, Path.home())
    wish = Wish(args.ask, args.once, args.rollback, args.stop)
    key = os.environ.get("NANOCHAT_API_KEY")
    return serve(asked.loaded, asked.store(), wish, os.environ.get("RAY_ADDRESS"), key)


def _chat(args: argparse.Namespace) -> int:
    from pipelines.service.chat import chat

    return chat(args.url, os.environ.get("NANOCHAT_API_KEY"))


def _key(args: argparse.Namespace) -> int:
    from pipelines.service.keys import KeyFileError, entry_of, make_key

    key = make_key()
    try:
        entry = entry_of(args.name, key)
    except KeyFileError as error:
        return _say(error, WRONG)
    print(f"the key, which is shown this once: give it to {args.name}\n{key}\n")
    print(f"its line in the file that `serve.keys` names (it holds no key, only the hash)\n{entry}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    made = made_by()
    commit = f"{made['commit']}{'-dirty' if made['dirty'] else ''}"
    given = [] if made["commit"] is None else ["--commit", commit]
    options = [*given, *args.options]
    if args.what in ("serve", "scale"):
        bench = import_module(f"pipelines.bench.{args.what}")
        return int(bench.main(options, partial(prepare, os.environ, Path.home()), os.environ.get("RAY_ADDRESS")))
    if args.what == "train":
        from nanochat.bench import train

        def torchrun(asked: argparse.Namespace) -> Any:
            prepare(os.environ, Path.home())  # before Ray is imported
            return import_module("pipelines.bench.train").against_torchrun(asked)

        return train.main(options, torchrun)
    return int(import_module(f"nanochat.bench.{args.what}").main(options))


def _report(asked: Asked) -> int:
    from pipelines.report import report_json, write_report

    loaded, store = asked.loaded, asked.store()
    if asked.args.json:
        print(as_json(report_json(asked.steps, store)))
        return 0
    out = asked.args.out or Path(f"{loaded.pipeline.name}-{loaded.profile_name}.html")
    try:
        print(write_report(loaded, asked.steps, store, out))
    except OSError as error:
        return _say(f"{out} cannot be written: {error.strerror}; choose another with --out PATH", WRONG)
    return 0


def _gc(asked: Asked) -> int:
    store, loaded = asked.store(), asked.loaded
    addressed = {step.address for step in plan(loaded)}
    for profile in loaded.pipeline.profiles:
        addressed |= {step.address for step in plan(load(loaded.path, profile))}
    found = garbage(store, loaded.pipeline.name, addressed)
    for one in found:
        if asked.args.yes:
            store.remove(one.address, one.part)
        place = f"{one.address}/{one.part}".rstrip("/")
        print(f"{'deleted ' if asked.args.yes else ''}{place}  {one.bytes / 1e6:,.1f} MB  {one.why}")
    total = sum(one.bytes for one in found) / 1e6
    if not found:
        print("nothing to delete")
    else:
        print(f"{total:,.1f} MB {'freed' if asked.args.yes else 'could be freed; delete with --yes'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
