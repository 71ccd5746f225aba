"""At most one live run builds an artifact: a file in its work/ says who, and a heartbeat says that they live.

The holder is the newest of `.lease-<number>.json`; a run takes over by creating the next number, which only one can do.
Whether another host's holder lives is seen by watching its heartbeat, not by comparing clocks, so a wrong clock loses
nothing. And should two believe that they hold it: a stage's output depends on its key alone, and the first to commit
wins, so what is lost is time.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

from pipelines.artifacts import Dir, StoreError

BEAT_S = 5.0
DEAD_S = 30.0  # a holder whose heartbeat has not moved for so long is dead
PREFIX = ".lease-"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who builds an artifact, or was the last to try."""

    pipeline: str
    stage: str
    host: str
    pid: int
    number: int = 0  # of the lease: the newest counts
    beat: int = 0
    released: bool = False
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """host:pid, for people."""
        return f"{self.host}:{self.pid}"

    @property
    def gone(self) -> bool:
        """Surely not building: it said so, or its process on this host is dead."""
        return self.released or (self.host == socket.gethostname() and not _alive(self.pid))


class StageHeld(RuntimeError):  # noqa: N818  a state of the world, not a mistake
    """Another live run builds the same artifact."""


def holder(work: Dir) -> Holder | None:
    """Who builds an artifact or was the last to try; None where nobody did. work: its work folder."""
    while numbers := _numbers(work):
        with suppress(FileNotFoundError), work.open(_name(max(numbers))) as file:
            return Holder(**json.load(file))
        # It was just taken over, so there is a newer one: look again.
    return None


class Lease:
    """Held inside `with`. Raises StageHeld on entry when another run lives and `wait` is not set.

    when_lost: called once, by the thread of the heartbeat, as soon as `lost` is true.
    """

    def __init__(
        self, work: Dir, me: Holder, *, wait: bool, tell: Callable[[str], None], when_lost: Callable[[], None]
    ) -> None:
        self.work = work
        self.me = me
        self.wait = wait
        self.tell = tell
        self.when_lost = when_lost
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards `me`
        self._beaten = time.monotonic()
        self._lost = False
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        while not self._take():
            pass
        self._beaten = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self.me = replace(self.me, released=True)
            try:
                self.work.put(_name(self.me.number), _bytes(self.me))
            except StoreError:
                if error is None:
                    raise

    def progress(self, numbers: dict[str, Any]) -> None:
        """What the next heartbeat says."""
        with self._lock:
            self.me = replace(self.me, progress=numbers)

    def lost(self) -> bool:
        """Whether another run has taken over, or could have: no heartbeat could be written for DEAD_S seconds."""
        return self._lost or time.monotonic() - self._beaten > DEAD_S

    def _take(self) -> bool:
        now = holder(self.work)
        if now is not None and not now.gone:
            self.tell(f"{now.who} seems to build it; watching whether it lives")
            living = self._watch(now)
            if living is not None and not self.wait:
                raise StageHeld(
                    f"stage {self.me.stage} is being built by {living.who}{_far(living)}; "
                    "wait for it with --wait, or end that run first"
                )
            if living is not None:
                return False
        number = now.number + 1 if now else 1
        self.me = replace(self.me, number=number)
        if not self.work.create(_name(number), _bytes(self.me)):
            return False  # another was quicker; look again
        for old in _numbers(self.work):
            if old < number:
                self.work.delete(_name(old))
        return True

    def _watch(self, before: Holder) -> Holder | None:
        """Watches a holder until its heartbeat moves; None if it lets go, or when DEAD_S seconds are over."""
        end = time.monotonic() + DEAD_S
        while time.monotonic() < end:
            time.sleep(BEAT_S / 10)
            now = holder(self.work)
            if now is None or now.gone:
                return None
            if (now.number, now.beat) != (before.number, before.beat):
                return now
        return None

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with self._lock:
                self.me = replace(self.me, beat=self.me.beat + 1)
                said = _bytes(self.me)
            try:
                self._lost = max(_numbers(self.work), default=0) > self.me.number
                if not self._lost:
                    self.work.put(_name(self.me.number), said)
                    self._beaten = time.monotonic()
            except StoreError as error:
                self.tell(f"the heartbeat could not be written, will try again: {error}")
            if self.lost():
                self.when_lost()
                return


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _far(now: Holder) -> str:
    return f", {now.progress['done']} of {now.progress['total']} {now.progress['unit']}s done" if now.progress else ""


def _name(number: int) -> str:
    return f"{PREFIX}{number:08d}.json"


def _numbers(work: Dir) -> list[int]:
    folder = f"{work.address}/{work.part}"
    names = [f.name.removeprefix(f"{folder}/") for f in work.store.found(folder)]
    return [int(n.removeprefix(PREFIX).removesuffix(".json")) for n in names if n.startswith(PREFIX)]


def _bytes(me: Holder) -> bytes:
    return (json.dumps(asdict(me), indent=1) + "\n").encode()
