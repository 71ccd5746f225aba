"""What the drills share: a `base` to train for seconds, and what is seen of it from outside."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.commands import ROOT, TINY, arguments, environment

STORE = ".cache/nanochat-ray"
ONLY = ("--only", "base")
PATIENCE_S = 120.0

# Long enough to be killed in the middle, with a checkpoint every second.
DRILL = {
    **TINY,
    "base.tokens": "480_000",
    "place.base.checkpoint_s": "1",
    "place.base.retries": "2",
    "place.base.cpus": "1",
}


class Base:
    """The stage `base` in a home of its own."""

    def __init__(self, home: Path, settings: dict[str, str], **more: str) -> None:
        """more: environment."""
        self.home, self.settings = home, settings
        self.environment = environment(home) | {"PYTHONPATH": str(ROOT / "tests" / "rows")} | more
        self.rows_file = home / "rows.jsonl"
        self.started: list[subprocess.Popen[str]] = []

    def build_on(self, other: "Base") -> None:
        """Takes over all that `base` builds on."""
        for part in ("vocabulary", "token_shards"):
            shutil.copytree(other.home / STORE / part, self.home / STORE / part)

    def run(self) -> None:
        """To the end, undisturbed."""
        process = self.start()
        said, _ = process.communicate()
        assert process.returncode == 0, said

    def start(self) -> subprocess.Popen[str]:
        """`nanochat run`, in the background."""
        process = subprocess.Popen(
            arguments("run", self.settings, *ONLY),
            env=self.environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Of what a failed drill left, and of its Ray."""
        for process in self.started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    @property
    def folder(self) -> Path:
        """Of the artifact, built or not."""
        (folder,) = (self.home / STORE / "checkpoint").glob("base-*")
        return folder

    def committed(self) -> int:
        """The newest step whose checkpoint has its manifest; 0 before the first."""
        found = (self.home / STORE / "checkpoint").glob("base-*/work/step-*/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def weights(self) -> str:
        """sha256 of the built checkpoint's weights."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        return next(f["sha256"] for f in manifest["files"] if f["path"] == "model.safetensors")

    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps.jsonl of the built checkpoint."""
        return [json.loads(line) for line in next(self.folder.glob("data-*/steps.jsonl")).read_text().splitlines()]

    def taken(self) -> list[dict[str, Any]]:
        """What rank took which rows for which step, in the order of time (tests/rows)."""
        lines = self.rows_file.read_text().splitlines(keepends=True) if self.rows_file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written

    def applied(self) -> dict[int, list[str]]:
        """Step -> the rows of its global batch, as they were taken the last time: those before were lost."""
        newest = {(line["step"], line["rank"]): line for line in self.taken()}
        return {
            step: [row for part in range(line["world"]) for row in newest[step, part]["rows"]]
            for (step, rank), line in sorted(newest.items())
            if rank == 0
        }


@contextmanager
def undisturbed(folder: Path, settings: dict[str, str]) -> Iterator[Base]:
    """`base`, built by one worker without a disturbance."""
    base = Base(folder, settings)
    base.run()
    yield base
    base.end()


def until(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Waits until something is true and returns it; fails at once if the process ends before."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := what():
            return found
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_S} s")


def train_workers(driver: int) -> list[psutil.Process]:
    """The processes of this driver's Ray that train."""
    return [p for p in psutil.Process(driver).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
