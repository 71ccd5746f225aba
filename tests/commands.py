"""The command line as a user types it: `nanochat`, in a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
FILE = ROOT / "pipelines" / "speedrun.yaml"
BIN = Path(sys.executable).parent

# A life of seconds: for tests that look at what happens, not at how good the model gets.
TINY = {
    "base.model": "{depth: 2, head_dim: 32, aspect: 32, context: 128}",
    "base.tokens": "400_000",
    "base.batch_tokens": "4096",
    "chat.batch_tokens": "4096",
    "chat.epochs": "0.1",
    "chat_report.examples": "8",
    "vocabulary.size": "512",
    "vocabulary.max_bytes": "1_000_000",
}


def environment(home: Path) -> dict[str, str]:
    """The tests' own environment with another home, so that no test sees a user's store."""
    kept = {name: value for name, value in os.environ.items() if name != "VENV"}  # .ci/run's; a user has none
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(BIN.parent),
    }


def arguments(verb: str, sets: dict[str, str], *more: str) -> list[str]:
    """`nanochat VERB pipelines/speedrun.yaml --profile laptop --set ...`."""
    pairs = [word for path, value in sets.items() for word in ("--set", f"{path}={value}")]
    return [str(BIN / "nanochat"), verb, str(FILE), "--profile", "laptop", *pairs, *more]


def nanochat(
    home: Path, verb: str, sets: dict[str, str], *more: str, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Runs a verb to its end."""
    return subprocess.run(
        arguments(verb, sets, *more), env=environment(home), cwd=home, capture_output=True, text=True, timeout=timeout
    )


def plan(home: Path, sets: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The steps of `plan --json`, by name."""
    done = nanochat(home, "plan", sets, "--json")
    assert done.returncode == 0, done.stderr
    return {step["name"]: step for step in json.loads(done.stdout)["steps"]}


def left_over(home: Path, patience: float = 10) -> list[str]:
    """Command lines of the processes started with this home that still live after `patience` seconds.

    Ray's own end a moment after the command that started them.
    """
    end = time.monotonic() + patience
    while (found := _alive(home)) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _alive(home: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
