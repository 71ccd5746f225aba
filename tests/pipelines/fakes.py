"""Stages without torch or Ray, for tests of the pipeline layer. Named in STAGES as the real ones are."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Store, StoreError
from pipelines.documents import SourceFileChangedError
from pipelines.lease import Holder
from pipelines.load import Loaded, load
from pipelines.plan import Step, plan
from pipelines.runner import Event, Job, Options, Progress, StageFailed, run
from pipelines.spec import Evaluate, Export, Pretrain, Sft, Tokenize, Tokenizer

FILE = Path(__file__).parents[2] / "pipelines" / "speedrun.yaml"
CLASSES = (Tokenizer, Tokenize, Pretrain, Sft, Evaluate, Export)


def good(spec: Any, job: Job) -> dict[str, float]:
    """Copies its inputs' words and its own settings into the artifact."""
    words = []
    for field, files in job.inputs.items():
        with files.open("data.txt") as file:
            words.append(f"{field}: {len(file.read())}")
    job.say(Progress(done=1, total=2, unit="step", numbers={"train_loss": 2.5}))
    job.out.put("data.txt", f"{spec!r} {words} {job.seed}".encode())
    job.out.put("inner/more.txt", b"more")
    return {"train_steps": 1.0}


def plug(spec: Any, job: Job) -> dict[str, float]:
    """Fails the first time, and goes on from its work the second."""
    job.out.put("half.txt", b"half")
    if not job.work.list():
        job.work.put("step-1", b"1")
        raise RuntimeError("somebody pulled the plug")
    return good(spec, job)


def full(spec: Any, job: Job) -> dict[str, float]:
    """A disk fills up far away, and the error comes wrapped as Ray wraps it."""
    error = RuntimeError("many lines of trace")
    error.cause = StoreError("the store is full")  # type: ignore[attr-defined]
    raise StageFailed(job.step.name, "workers died") from error


def doubled(spec: Any, job: Job) -> dict[str, float]:
    """What a Ray task's StageFailed looks like to the driver."""
    from ray.exceptions import RayTaskError

    error = StageFailed(job.step.name, "the holdout is empty")
    raise RayTaskError("f", "Traceback\nmany lines", error).as_instanceof_cause()


def moved(spec: Any, job: Job) -> dict[str, float]:
    """A source file is another than the one that was listed."""
    raise RuntimeError("trace") from SourceFileChangedError("/data/x changed")


def interrupted(spec: Any, job: Job) -> dict[str, float]:
    """Ctrl-C after some work."""
    job.work.put("step-1", b"1")
    raise KeyboardInterrupt


def unlisted(spec: Any, job: Job) -> dict[str, float]:
    """A metric that pipelines/metrics.py does not have."""
    return {"los": 1.0}


def infinite(spec: Any, job: Job) -> dict[str, float]:
    """A metric that is not a number."""
    return {"train_loss": float("nan")}


def behind(spec: Any, job: Job) -> dict[str, float]:
    """Writes a file that no Dir has seen."""
    good(spec, job)
    Path(job.out.uri("stray.txt")).write_text("stray")
    return {}


def reads(spec: Any, job: Job) -> dict[str, float]:
    """Uses outside data where its spec names some."""
    if isinstance(spec, Tokenize | Tokenizer):
        job.source("source")
    return good(spec, job)


def rival(spec: Any, job: Job) -> dict[str, float]:
    """While it works, another run commits the same artifact."""
    manifests = build(job.out.store, [job.step], sneak=True)
    assert manifests
    return good(spec, job)


def overtaken(spec: Any, job: Job) -> dict[str, float]:
    """Another host takes the stage over, believing that this run is dead."""
    newer = Holder(pipeline="speedrun", stage=job.step.name, host="elsewhere", pid=1, number=99)
    job.work.put(".lease-00000099.json", json.dumps(asdict(newer)).encode())
    time.sleep(60)
    return good(spec, job)


def stages(name: str = "good") -> dict[type, str]:
    """STAGES in which every stage is the fake called `name`."""
    return dict.fromkeys(CLASSES, f"tests.pipelines.fakes:{name}")


def options(**more: Any) -> Options:
    """Those of a run of the shipped file under `laptop`."""
    return Options(**({"pipeline": "speedrun", "profile": "laptop", "seed": 7, "base": FILE.parent} | more))


def steps_of(loaded: Loaded | None = None, only: str | None = None) -> list[Step]:
    """The plan of the shipped file under `laptop`."""
    return plan(loaded or load(FILE, "laptop"), only)


def build(store: Store, steps: list[Step], name: str = "good", *, sneak: bool = False, **more: Any) -> list[Event]:
    """Runs fakes; returns what was said. sneak: commit without asking for the lease."""
    said: list[Event] = []
    if sneak:
        out, _ = store.begin(steps[-1].address)
        out.put("data.txt", b"the other's")
        step = steps[-1]
        from pipelines.artifacts import Manifest

        store.commit(
            Manifest(
                name=step.name,
                kind=step.kind,
                makes=step.spec.makes,
                key=step.key,
                data=out.part,
                recipe=step.recipe,
                inputs={},
                files=out.written(),
                pipeline="speedrun",
                profile="laptop",
            )
        )
        return [Event(step, "made")]
    run(steps, store, stages(name), options(**more), said.append)
    return said


def words(said: list[Event]) -> list[str]:
    """`corpus made`, without progress."""
    return [f"{e.step.name} {e.what}" for e in said if e.what in ("built", "made")]


def fake_sources(monkeypatch: pytest.MonkeyPatch, files: list[Any]) -> None:
    """Lets every source list `files`; the list may be changed afterwards."""
    monkeypatch.setattr("pipelines.sources.listing", lambda source, base: list(files))
    monkeypatch.setattr("pipelines.sources.materialise", lambda source, store: list(files))


def edited(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the shipped file in which each `old`, that stands there once, is `new`."""
    text = FILE.read_text()
    for old, new in changes:
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path
