"""Runs the steps of a plan in order, skips the built ones, and commits what each stage made.

A stage sees its settings and a Job, and nothing else. Why a stage does not run twice at once: pipelines/lease.py.
"""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from nanochat.files import File
from pipelines.artifacts import MANIFEST, BrokenArtifactError, Dir, Manifest, Store, StoreError
from pipelines.documents import SourceError, SourceFile, SourceFileChangedError
from pipelines.lease import DEAD_S, Holder, Lease, StageHeld
from pipelines.metrics import UNITS
from pipelines.plan import Step
from pipelines.provenance import code_digest


@dataclass(frozen=True)
class Progress:
    """How far a stage is. `numbers`: metrics of pipelines/metrics.py as they stand now (train_loss, tokens_per_s)."""

    done: int
    total: int | None
    unit: str  # what is counted: step, shard, part
    numbers: Mapping[str, float] = field(default_factory=dict)


class StageFailed(RuntimeError):  # noqa: N818  the name that DESIGN.md gives it
    """A stage could not make its artifact. Its work is kept, and the same command goes on from there."""

    def __init__(self, stage: str, problem: str) -> None:
        super().__init__(stage, problem)
        self.stage = stage
        self.problem = problem

    def __str__(self) -> str:
        return f"stage {self.stage} failed: {self.problem}"


class SourceChanged(RuntimeError):  # noqa: N818  a state of the world, not a mistake
    """A file of outside data is not the one that a built artifact was made from."""


@dataclass(frozen=True)
class Job:
    """Everything a stage is given. It writes in `out` and `work`, and nowhere else."""

    step: Step
    seed: int  # 0 for a stage that does not draw: the seed is not in its key
    inputs: dict[str, Dir]  # field -> the files of a built artifact
    out: Dir  # empty; what is here when the stage returns is the artifact
    work: Dir  # kept when the stage fails, so that the next try can resume
    base: Path  # the folder of the pipeline file: relative paths begin there
    say: Callable[[Progress], None]  # from any thread
    note: Callable[[str], None] = lambda text: None  # of what the user waits for
    lost: Callable[[], bool] = lambda: False  # whether another run has taken the stage over: nothing may be written
    sources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # filled by `source`

    def source(self, name: str) -> list[SourceFile]:
        """The files of the outside data that the field `name` names; their listing goes into the manifest.

        Python's own library differs from host to host, so the driver writes it into the store for all workers.
        """
        from pipelines.sources import QUESTIONS, STDLIB, listing, materialise

        source: str = getattr(self.step.spec, name)
        files = listing(source, self.base)
        self.sources[name] = [asdict(f) for f in files]
        if source in (STDLIB, QUESTIONS):
            return materialise(source, self.out.store.dir("source", "stdlib"))
        return files


StageFn = Callable[[Any, Job], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run needs besides the plan and the store."""

    pipeline: str
    profile: str
    seed: int
    base: Path
    rebuild: frozenset[str] = frozenset()  # stages to make anew though they are built
    wait: bool = False  # for another run that builds the same stage, instead of failing
    made: Mapping[str, Any] = field(default_factory=dict)  # who makes it: commit, dirty, host
    around: Callable[[], AbstractContextManager[object]] = nullcontext  # entered before the first stage that is made


@dataclass(frozen=True)
class Event:
    """Something that a run has to say."""

    step: Step
    what: Literal["built", "started", "progress", "made", "waiting"]
    progress: Progress | None = None
    manifest: Manifest | None = None
    text: str = ""


def run(
    steps: Sequence[Step], store: Store, stages: Mapping[type, str], options: Options, tell: Callable[[Event], None]
) -> list[Manifest]:
    """Builds what is not built yet, in order; returns the manifests of all steps.

    stages: class of a spec -> "module:function", imported when it is run.
    Raises StageFailed, StageHeld, SourceChanged, BrokenArtifactError or StoreError; KeyboardInterrupt passes through.
    Whatever is raised, the same call goes on where this one stopped.
    """
    done: dict[str, Manifest] = {}
    verified: set[str] = set()
    with ExitStack() as stack:
        entered = False
        for step in steps:
            if step.name not in options.rebuild and (there := built(step, store, options.base)):
                tell(Event(step, "built", manifest=there.manifest, text=there.notice))
                done[step.name] = there.manifest
                continue
            for name in sorted(set(step.inputs.values()) - verified):
                store.verify(done[name])
                verified.add(name)
            with _leased(step, store, options, tell) as lease:
                # Another run may have made it while this one waited.
                if step.name not in options.rebuild and (there := built(step, store, options.base)):
                    tell(Event(step, "built", manifest=there.manifest, text=there.notice))
                    done[step.name] = there.manifest
                    continue
                if not entered:
                    stack.enter_context(options.around())
                    entered = True
                tell(Event(step, "started"))
                maker = _Maker(step, store, options, lease, tell)
                done[step.name] = maker.make(stages[type(step.spec)], done)
            tell(Event(step, "made", manifest=done[step.name]))
    return list(done.values())


@dataclass(frozen=True)
class Built:
    """A built step: its files were seen to be there, and its outside data to be unchanged."""

    manifest: Manifest
    notice: str = ""  # what could not be seen


def built(step: Step, store: Store, base: Path) -> Built | None:
    """What there is of a step, files checked by size; None if it is not built.

    Raises BrokenArtifactError or SourceChanged.
    """
    try:
        manifest = store.read(step.address)
    except FileNotFoundError:
        return None
    store.check(manifest)
    for name, listing in manifest.sources.items():
        source = getattr(step.spec, name)
        try:
            changed = source_change(source, listing, base)
        except SourceError as error:
            if "://" in source:  # no network, perhaps: what is built can be used all the same
                return Built(manifest, f"whether its source changed could not be seen: {error}")
            changed = f"{error}: it changed"
        if changed:
            raise SourceChanged(
                f"stage {step.name}: {changed} since {step.name} was built; give stages.{step.name}.revision a new "
                f"value (--set {step.name}.revision=1) to build it anew from what is there now"
            )
    return Built(manifest)


def source_change(source: str, before: list[dict[str, Any]], base: Path) -> str | None:
    """The first file of outside data that is not what it was, and how; None where nothing changed."""
    from pipelines.sources import listing

    now = {f.uri: asdict(f) for f in listing(source, base)}
    then = {f["uri"]: f for f in before}
    for uri in sorted({*then, *now}):
        if uri not in now:
            return f"{uri} is gone"
        if uri not in then:
            return f"{uri} is new"
        if now[uri] != then[uri]:
            return f"{uri} changed ({then[uri]['bytes']} bytes then, {now[uri]['bytes']} now)"
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, through what Ray wraps around the errors of its workers."""
    todo, seen = [error], set()
    while todo:
        now = todo.pop(0)
        if id(now) not in seen:
            seen.add(id(now))
            yield now
            inner = [getattr(now, "cause", None), *getattr(now, "worker_failures", {}).values(), now.__cause__]
            todo += [e for e in inner if isinstance(e, BaseException)]


@contextmanager
def _leased(step: Step, store: Store, options: Options, tell: Callable[[Event], None]) -> Iterator[Lease]:
    """Holds the stage. If it is lost, what runs inside is interrupted as by Ctrl-C, and StageHeld says why."""
    me = Holder(pipeline=options.pipeline, stage=step.name, host=socket.gethostname(), pid=os.getpid())
    here = threading.current_thread()

    def interrupt() -> None:
        if here is threading.main_thread():  # the only one that signals reach
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    lease = Lease(
        store.dir(step.address, "work"),
        me,
        wait=options.wait,
        tell=lambda text: tell(Event(step, "waiting", text=text)),
        when_lost=interrupt,
    )
    with lease:
        try:
            yield lease
        except KeyboardInterrupt as error:
            if not lease.lost():
                raise
            raise StageHeld(
                f"stage {step.name} was taken over by another run, or its heartbeat could not be written for "
                f"{DEAD_S:.0f} s; `nanochat status` shows who builds it"
            ) from error


@dataclass(frozen=True)
class _Maker:
    """Makes one step that is not built, while its lease is held."""

    step: Step
    store: Store
    options: Options
    lease: Lease
    tell: Callable[[Event], None]

    def make(self, target: str, done: Mapping[str, Manifest]) -> Manifest:
        step, store, options = self.step, self.store, self.options
        if step.name in options.rebuild:
            forget(store, step.address)
        out, work = store.begin(step.address)
        job = Job(
            step=step,
            seed=options.seed if step.spec.draws else 0,
            inputs={f: store.dir(done[name].address, done[name].data) for f, name in step.inputs.items()},
            out=out,
            work=work,
            base=options.base,
            say=self._say,
            note=lambda text: self.tell(Event(step, "waiting", text=text)),
            lost=self.lease.lost,
        )
        started, clock = datetime.now(UTC), time.monotonic()
        metrics, files = self._call(target, job)
        seconds = time.monotonic() - clock
        manifest = Manifest(
            name=step.name,
            kind=step.kind,
            makes=step.spec.makes,
            key=step.key,
            data=out.part,
            recipe=step.recipe,
            inputs={f: done[name].address for f, name in step.inputs.items()},
            files=files,
            pipeline=options.pipeline,
            profile=options.profile,
            sources=job.sources,
            metrics=metrics,
            made={
                **options.made,
                "place": step.place.model_dump(mode="json"),
                "started": started.isoformat(timespec="milliseconds"),
                "seconds": round(seconds, 1),
            },
            code=code_digest(target),
        )
        try:
            store.commit(manifest)
        except FileExistsError:
            return store.read(step.address)
        return manifest

    def _call(self, target: str, job: Job) -> tuple[dict[str, float], tuple[File, ...]]:
        """Runs the stage's function; its metrics, and what it wrote."""
        module, _, name = target.partition(":")
        try:
            function: StageFn = getattr(import_module(module), name)
            metrics = function(self.step.spec, job)
            _check_metrics(metrics)
            return metrics, job.out.written()
        except Exception as error:
            raise _plain(self.step.name, error) from error

    def _say(self, progress: Progress) -> None:
        self.lease.progress(asdict(progress))
        self.tell(Event(self.step, "progress", progress=progress))


def _plain(stage: str, error: Exception) -> Exception:
    """The innermost error that says something to a person, or a StageFailed that names what went wrong."""
    inner = [cause for cause in causes(error) if getattr(cause, "cause", None) is None]  # not Ray's double of one
    for cause in reversed(inner):
        if isinstance(cause, (StoreError, BrokenArtifactError, StageFailed)):
            return type(cause)(*cause.args)
        if isinstance(cause, SourceFileChangedError):
            return SourceChanged(f"stage {stage}: {cause}; run the same again to take it as it is now")
        if isinstance(cause, SourceError):
            return StageFailed(stage, str(cause))
    return StageFailed(stage, f"{type(inner[-1]).__name__}: {inner[-1]}")


def forget(store: Store, address: str) -> None:
    """Makes an artifact unbuilt: its manifest goes first, then everything but the lease."""
    store.delete(f"{address}/{MANIFEST}")
    for part in store.folders(address):
        if part != "work":
            store.remove(address, part)
    work = store.dir(address, "work")
    for name in work.list():
        work.delete(name)


def _check_metrics(metrics: Mapping[str, float]) -> None:
    unknown = sorted(set(metrics) - set(UNITS))
    if unknown:
        raise ValueError(f"metrics that pipelines/metrics.py does not list: {', '.join(unknown)}")
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if broken:
        raise ValueError(f"metrics that are not finite: {broken}")
