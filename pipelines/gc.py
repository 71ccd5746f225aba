"""What nothing addresses any more: artifacts of this file's pipeline that none of its profiles names, and old tries."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from pipelines.artifacts import BrokenArtifactError, Found, Manifest, Store
from pipelines.lease import holder
from pipelines.spec import Kind

OLD_S = 24 * 3600.0  # a try, or the work of a built artifact, younger than this is left alone


@dataclass(frozen=True)
class Garbage:
    """An artifact, or a part of one, that may go."""

    address: str
    part: str  # "" for all of it
    bytes: int
    why: str


def garbage(store: Store, pipeline: str, addressed: set[str], now: float | None = None) -> list[Garbage]:
    """What may be deleted. addressed: what any profile of the pipeline file names.  now: seconds since 1970.

    Only what a manifest or a lease says to be of `pipeline` is listed: a store may be shared.
    """
    now = time.time() if now is None else now
    found: list[Garbage] = []
    for makes in get_args(Kind):
        for address in store.addresses(makes):
            found += _of_one(store, address, pipeline, address in addressed, now)
    return found


def _of_one(store: Store, address: str, pipeline: str, addressed: bool, now: float) -> Iterator[Garbage]:
    held = holder(store.dir(address, "work"))
    try:
        manifest: Manifest | None = store.read(address)
    except FileNotFoundError:
        manifest = None
    except BrokenArtifactError:
        return  # cannot be said to be ours; `nanochat run --rebuild` mends it
    owner = manifest.pipeline if manifest else held.pipeline if held else None
    files = store.found(address)
    newest = max((f.modified for f in files), default=0.0)
    if owner != pipeline or (held and not held.gone and now - newest < OLD_S):
        return
    if not addressed and (manifest or now - newest > OLD_S):
        yield Garbage(address, "", _size(files), "no profile of this file addresses it")
        return
    for part in store.folders(address):
        inside = [f for f in files if f.name.startswith(f"{address}/{part}/")]
        if now - max((f.modified for f in inside), default=now) < OLD_S:
            continue
        if part == "work":
            if manifest and any("/work/." not in f.name for f in inside):
                yield Garbage(address, part, _size(inside), "work of a built artifact, older than a day")
        elif not manifest or part.partition("-")[2] != manifest.data.partition("-")[2]:
            yield Garbage(address, part, _size(inside), "a try that did not count, older than a day")


def _size(files: list[Found]) -> int:
    return sum(f.bytes for f in files)
