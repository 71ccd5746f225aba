"""How the command line shows things: tables, progress, JSON. Computes nothing and prints nothing.

A table is lines of text; what a run says is written to a stream that is handed in.
"""

import json
import time
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.artifacts import Manifest
from pipelines.look import Live, Seen
from pipelines.metrics import METRICS, UNITS
from pipelines.room import Need
from pipelines.runner import Event
from pipelines.runner import Progress as Done

PLAIN_EVERY_S = 5.0
# Shown while a stage runs, where it says them.
NUMBERS = ("train_loss", "tokens_per_s", "mfu", "share_data", "share_exchange", "share_optimizer", "share_other")
DETAILS = {metric.name for metric in METRICS if metric.detail}


def plan_json(pipeline: str, profile: str, seen: Sequence[Seen], needs: Sequence[Need]) -> dict[str, Any]:
    """What `plan --json` prints. Keys are added, never changed."""
    return {
        "pipeline": pipeline,
        "profile": profile,
        "steps": [
            {
                "name": s.step.name,
                "kind": s.step.kind,
                "makes": s.step.spec.makes,
                "key": s.step.key,
                "state": s.state,
                "why": s.why,
                "address": s.step.address,
                "path": s.path,
                "changes": list(s.changes),
                "estimate": {"memory_bytes": n.memory, "disk_bytes": n.disk} if s.step.place.gpu is None else None,
                "place": s.step.place.model_dump(mode="json"),
                "notice": s.notice,
            }
            for s, n in zip(seen, needs, strict=True)
        ],
    }


def plan_lines(seen: Sequence[Seen]) -> list[str]:
    """The plan as a table, and beneath each step what is to be said about it."""
    lines = table(
        ["stage", "kind", "state", "key", "runs on"],
        [[s.step.name, s.step.kind, s.state, s.step.key, _place(s)] for s in seen],
    )
    shown = lines[:1]
    said: set[str] = set()
    for line, s in zip(lines[1:], seen, strict=True):
        shown.append(line)
        remarks = [s.why, *s.changes, s.notice] if s.state != "built" or s.source_changed else [s.notice]
        shown += [f"    {remark}" for remark in remarks if remark and remark not in said]
        said |= {s.why, s.notice} if s.state in ("unknown", "built") else set()
    return shown


def status_json(live: Sequence[Live]) -> dict[str, Any]:
    """What `status --json` prints."""
    return {
        "steps": [
            {
                "name": one.seen.step.name,
                "key": one.seen.step.key,
                "state": one.state,
                "why": one.seen.why,
                "holder": one.holder.who if one.holder else None,
                "progress": (one.holder.progress or None) if one.holder else None,
                "metrics": one.seen.manifest.metrics if one.seen.manifest else None,
                "seconds": one.seen.manifest.made.get("seconds") if one.seen.manifest else None,
            }
            for one in live
        ]
    }


def status_lines(live: Sequence[Live]) -> list[str]:
    """Every step: what it is, how far, and the numbers it ended with."""
    return table(["stage", "state", "how far"], [[o.seen.step.name, o.state, _how_far(o)] for o in live])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest word, the last one open."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]


def number(value: float) -> str:
    """For people: 3,276,800 and 1.482."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


class JsonLines:
    """One JSON line a stage, when it is there."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, event: Event) -> None:
        """Writes what is final; progress is nothing to a program that reads lines."""
        if event.manifest is not None:
            line = {
                "stage": event.step.name,
                "event": event.what,
                "key": event.step.key,
                "address": event.step.address,
                "metrics": event.manifest.metrics,
                "made": event.manifest.made,
            }
            self.stream.write(json.dumps(line) + "\n")
            self.stream.flush()

    def close(self) -> None:
        """Nothing is open."""


class PlainLines:
    """Lines for a log: what begins and ends, and every few seconds how far it is."""

    def __init__(self, stream: TextIO, every_s: float = PLAIN_EVERY_S) -> None:
        self.stream = stream
        self.every_s = every_s
        self.said = 0.0
        self.first: tuple[int, float] | None = None  # work done and time when the stage was first heard of

    def __call__(self, event: Event) -> None:
        """Writes a line, or nothing if one of progress was written just before."""
        now = time.monotonic()
        if event.what == "progress" and event.progress is not None:
            self.first = self.first or (event.progress.done, now)
            if now - self.said < self.every_s:
                return
            self.said = now
            text = f"{_counted(event.progress)}{_eta(event.progress, self.first, now)}"
        else:
            text = _sentence(event)
            self.first, self.said = None, 0.0
        self.stream.write(f"{event.step.name}: {text}\n")
        self.stream.flush()

    def close(self) -> None:
        """Nothing is open."""


class Bars:
    """A moving bar for a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream)
        self.bars = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counted]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Moves the bar, or ends it and leaves a line."""
        if event.what == "started":
            self.bars.start()
            self.task = self.bars.add_task(event.step.name, total=None, counted="begins")
        elif event.what == "progress" and event.progress is not None and self.task is not None:
            done = event.progress
            self.bars.update(self.task, completed=done.done, total=done.total, counted=_counted(done))
        else:
            self.close()
            self.console.print(
                f"{event.step.name:12} {_sentence(event)}", highlight=False, markup=False, soft_wrap=True
            )

    def close(self) -> None:
        """Takes the bar away."""
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
        self.bars.stop()


def _sentence(event: Event) -> str:
    if event.what == "started":
        return "begins"
    if event.manifest is None:
        return event.text
    if event.what == "built":
        return f"built{f' ({event.text})' if event.text else _metrics(event.manifest)}"
    return f"made in {event.manifest.made['seconds']:,.0f} s{_metrics(event.manifest)}"


def _metrics(manifest: Manifest) -> str:
    shown = {name: value for name, value in manifest.metrics.items() if name not in DETAILS}
    return "".join(f", {name} {_value(name, value)}" for name, value in shown.items())


def _counted(done: Done) -> str:
    of = f" of {done.total:,}" if done.total is not None else ""
    numbers = "".join(f", {name} {_value(name, done.numbers[name])}" for name in NUMBERS if name in done.numbers)
    return f"{done.unit} {done.done:,}{of}{numbers}"


def _value(name: str, value: float) -> str:
    return f"{100 * value:.3g}%" if UNITS.get(name) == "share" else number(value)


def _eta(done: Done, first: tuple[int, float], now: float) -> str:
    if done.total is None or done.done <= first[0]:
        return ""
    left = (done.total - done.done) * (now - first[1]) / (done.done - first[0])
    return f", {left:,.0f} s left"


def _place(seen: Seen) -> str:
    place = seen.step.place
    each = f"{place.cpus} CPU" + (f" + {place.gpu}" if place.gpu else "")
    workers = f"{place.workers[0]}-{place.workers[1]}" if isinstance(place.workers, tuple) else place.workers
    return f"{workers} x {each}"


def _how_far(one: Live) -> str:
    if one.seen.manifest is not None:
        return _metrics(one.seen.manifest).removeprefix(", ")
    said = _counted(Done(**one.holder.progress)) if one.holder and one.holder.progress else ""
    by = f" on {one.holder.who}" if one.holder and one.state in ("running", "lost") else ""
    return f"{said}{by}" or one.seen.why


def as_json(value: Any) -> str:
    """For programs to read."""
    return json.dumps(value, indent=1)
