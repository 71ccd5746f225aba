"""Short turns: those threads get them that are there, their children do not, and nothing else changes."""

import platform
import subprocess
import sys

import pytest

LOOK = """
import os, sys, threading
from pathlib import Path
from pipelines.service import turns

def turn_ns():  # of this thread, as the kernel itself tells it
    lines = Path(f"/proc/self/task/{threading.get_native_id()}/sched").read_text().splitlines()
    return next((int(line.split(":")[1]) for line in lines if line.startswith("se.slice")), 0)

def in_thread():
    thread = threading.Thread(target=lambda: found.append(turn_ns()))
    thread.start()
    thread.join()

found, go = [], threading.Event()
waiting = threading.Thread(target=lambda: (go.wait(), found.append(turn_ns())))
waiting.start()
os.nice(3)
usual = turn_ns()
if sys.argv[1] == "unknown":
    turns.SYSCALLS.clear()
turns.take_short_turns()
found.append(turn_ns())
go.set()
waiting.join()
in_thread()
assert os.nice(0) == 3
print(usual, *found)
"""


def turns_of(how: str) -> list[int]:
    """Usual; then of the main thread, of one that was there, and of one that began afterwards; in nanoseconds."""
    done = subprocess.run([sys.executable, "-c", LOOK, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def linux() -> tuple[int, ...]:
    if platform.system() != "Linux":
        return (0, 0)
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


@pytest.mark.skipif(linux() < (6, 12), reason="threads choose their turns from Linux 6.12 on")
def test_threads_that_are_there_take_short_turns() -> None:
    usual, main, waiting, later = turns_of("known")
    assert (main, waiting, later) == (100_000, 100_000, usual)
    assert usual > 500_000


@pytest.mark.skipif(linux() < (6, 12), reason="threads choose their turns from Linux 6.12 on")
def test_nothing_happens_on_a_processor_whose_calls_are_not_known() -> None:
    assert len(set(turns_of("unknown"))) == 1
