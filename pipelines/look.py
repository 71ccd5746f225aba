"""What a store says about the steps of a plan: built or not, why not, what changed, who works on it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.artifacts import BrokenArtifactError, Manifest, Store, StoreError, stage_of
from pipelines.lease import DEAD_S, Holder, holder
from pipelines.plan import Step, changes
from pipelines.provenance import code_digest
from pipelines.runner import SourceChanged, built

OTHER_CODE = "made by other code than this; if what it makes has changed, raise `version` of its class in spec.py"


@dataclass(frozen=True)
class Seen:
    """A step, and what the store has of it."""

    step: Step
    state: Literal["built", "partial", "missing", "unknown"]
    why: str = ""  # why it would be built, or why nothing is known
    changes: tuple[str, ...] = ()  # against the last build of the same stage
    manifest: Manifest | None = None
    path: str | None = None  # where the files of a built artifact can be read
    notice: str = ""  # built, but something about it is worth knowing
    source_changed: bool = False


def look(steps: Sequence[Step], store: Store, pipeline: str, base: Path, targets: dict[type, str]) -> list[Seen]:
    """Asks the store about every step. Once it cannot be asked, the rest is unknown without asking again.

    targets: class of a spec -> "module:function".
    """
    seen: list[Seen] = []
    for number, step in enumerate(steps):
        try:
            seen.append(_one(step, store, pipeline, base, targets[type(step.spec)]))
        except StoreError as error:
            return seen + unknown(steps[number:], str(error))
    return seen


def unknown(steps: Sequence[Step], why: str) -> list[Seen]:
    """Steps of which nothing can be known."""
    return [Seen(step, "unknown", why) for step in steps]


def _one(step: Step, store: Store, pipeline: str, base: Path, target: str) -> Seen:
    try:
        there = built(step, store, base)
    except BrokenArtifactError as error:
        return Seen(step, "missing", f"broken: {error.problem}; rebuild it with --rebuild {step.name}")
    except SourceChanged as error:
        changed = store.read(step.address)
        path = store.dir(step.address, changed.data).uri()
        return Seen(step, "built", str(error), manifest=changed, path=path, source_changed=True)
    if there is not None:
        manifest, notice = there.manifest, there.notice
        if manifest.code != code_digest(target):
            notice = notice or OTHER_CODE
        return Seen(step, "built", manifest=manifest, path=store.dir(step.address, manifest.data).uri(), notice=notice)
    state = store.state(step.address)
    before = latest(step, store, pipeline)
    named = tuple(changes(before.recipe, step.recipe, step.inputs)) if before else ()
    why = "changed" if before else "never built"
    return Seen(step, state, "interrupted; goes on from its last checkpoint" if state == "partial" else why, named)


def latest(step: Step, store: Store, pipeline: str) -> Manifest | None:
    """The newest build of the same stage of the same pipeline, under another key."""
    manifests = []
    for address in store.addresses(step.spec.makes):
        if stage_of(address) == step.name:
            try:
                manifests.append(store.read(address))
            except (FileNotFoundError, BrokenArtifactError):
                continue  # never finished, or nothing that could be compared with
    ours = [m for m in manifests if m.pipeline == pipeline]
    return max(ours, key=lambda m: str(m.made.get("started", "")), default=None)


@dataclass(frozen=True)
class Live:
    """A step, and who works on it or did last."""

    seen: Seen
    state: Literal["built", "running", "lost", "partial", "missing", "unknown"]
    holder: Holder | None = None


def alive(seen: Sequence[Seen], store: Store) -> list[Live]:
    """The same steps with running and lost told apart from partial and missing."""
    return [_alive(s, store) if s.state in ("partial", "missing") else Live(s, s.state) for s in seen]


def _alive(seen: Seen, store: Store) -> Live:
    work = store.dir(seen.step.address, "work")
    held = holder(work)
    if held is None or held.released:
        return Live(seen, seen.state, held)
    beats = [f.modified for f in store.found(f"{work.address}/{work.part}") if "/.lease-" in f.name]
    late = time.time() - max(beats, default=0.0) > DEAD_S
    return Live(seen, "lost" if held.gone or late else "running", held)
