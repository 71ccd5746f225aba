"""Processes of this machine, as Linux's /proc tells: who began whom, what each has used."""

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

PROC = Path("/proc")


def descendants(pid: int) -> set[int]:
    """Processes that `pid` began, those that these began, and so on."""
    children: dict[int, set[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), set()).add(int(entry.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        new = children.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time so far of all threads of a process; 0 of one that is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def name(pid: int) -> str:
    """What the process calls itself: `raylet`, or `ray-dashboard-ReportHead-0`."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "gone"
    words = [word for word in words if not word.startswith("-")]
    script = next((word for word in words[:3] if word.endswith(".py")), words[0] if words else "")
    return Path(script.split(" ")[0]).name or "gone"


@contextmanager
def paused(pids: Collection[int]) -> Iterator[None]:
    """They get no processor time meanwhile."""
    _signal(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(pids, signal.SIGCONT)


def _signal(pids: Collection[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended by itself


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on, which is the first; none of a process that is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
