"""`nanochat serve` as a program of its own, with the processes it starts."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.served import build, write_file

SERVE = ("-m", "pipelines.cli", "serve")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Program:
    """`serve` as a program of its own, with what it has printed so far."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    def wait(self, text: str, seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while text not in "".join(self.lines):
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < end, "".join(self.lines)
            time.sleep(0.05)


@contextmanager
def started(folder: Path, *, once: bool = False, replicas: int = 1, depth: int = 1) -> Iterator[Program]:
    """The program; told to end, if it has not, when the block ends."""
    port = free_port()
    loaded = write_file(folder, port, replicas=replicas, depth=depth)
    build(loaded, depth=depth)
    questions = [f"--ask={question}" for question in ("Hello?", "Who?")]
    options = ["--profile", "here", *questions, *(["--once"] if once else [])]
    process = subprocess.Popen(
        [sys.executable, "-u", *SERVE, str(loaded.path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    program = Program(process, f"http://127.0.0.1:{port}")
    reader = threading.Thread(target=lambda: program.lines.extend(process.stdout or ()))
    reader.start()
    try:
        yield program
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
        if process.stdout is not None:
            process.stdout.close()


def family(pid: int) -> dict[int, str]:
    """The living descendants of a process and what each calls itself."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found: dict[int, str] = {}
    for child, parent in sorted(parents.items()):
        while parent in parents and parent != pid:
            parent = parents[parent]
        if parent == pid:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def wait_until_gone(pids: set[int]) -> None:
    end = time.monotonic() + 15
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"left running: {left}"
        time.sleep(0.1)
