"""Another process that measures: made fresh, so that its memory is its own, and asleep until it is asked.

Only one side may work at a time: threads that wait for each other lose far more than their share to a stranger.
Questions and answers are pickled through the process's own pipes.

    python -m nanochat.bench.worker       is the other end; it is started by `Worker`
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")


class Worker:
    """An object that lives in a process of its own. `ask` calls a method of it and waits for the answer."""

    def __init__(self, made_by: Callable[[Any], object], setup: object) -> None:
        """made_by(setup) makes the object there. What `ask` raises is raised here too."""
        self.name = made_by.__name__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nanochat.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self._call(made_by, setup)
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *arguments: object) -> Any:
        """The answer. ValueError, RuntimeError and MemoryError of the method are raised here."""
        return self._call(method, arguments)

    def cpu_seconds(self) -> float | None:
        """Processor time so far, of all its threads; None where there is no /proc."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return None
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()  # it sees the end of its questions
            self._process.wait(timeout=20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, *question: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()
            answer, error = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as gone:
            code = self._process.wait()
            raise RuntimeError(f"the process of {self.name} ended with code {code}; what it said is above") from gone
        if error is not None:
            raise error
        return answer


def in_turn(workers: Sequence[Worker], run: Callable[[Worker, int], T], runs: int) -> list[list[T]]:
    """The runs of each worker, one after the other: ours, theirs, ours, theirs. run is told the number of the run.

    Says on stderr if a worker was busy while another one's run was timed.
    """
    results: list[list[T]] = [[] for _ in workers]
    idle_s = 0.0
    for number in range(runs):
        for worker, found in zip(workers, results, strict=True):
            others = [other for other in workers if other is not worker]
            before = [other.cpu_seconds() or 0.0 for other in others]
            found.append(run(worker, number))
            idle_s += sum((other.cpu_seconds() or 0.0) - past for other, past in zip(others, before, strict=True))
            time.sleep(0.05)  # threads that spin a while for their next task go to sleep
    if idle_s > 0.1 * runs:
        print(
            f"processes that should have slept used {idle_s:.1f} s of processor time while others were measured; "
            "their threads spin (OMP_WAIT_POLICY=passive ends that), and the numbers are too low",
            file=sys.stderr,
        )
    return results


def main() -> None:
    """Answers until there are no more questions."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    made_by, setup = pickle.load(questions)
    made: list[object] = []

    def make() -> None:
        made.append(made_by(setup))

    _reply(answers, make)
    while True:
        try:
            method, arguments = pickle.load(questions)
        except EOFError:
            return
        _reply(answers, partial(getattr(made[0], method), *arguments))


def _reply(answers: BinaryIO, work: Callable[[], object]) -> None:
    """Does it and sends what came out. An error that is not about what was asked ends the process."""
    try:
        answer: tuple[object, Exception | None] = work(), None
    except (ValueError, RuntimeError, MemoryError) as raised:
        answer = None, raised
    pickle.dump(answer, answers)
    answers.flush()


if __name__ == "__main__":
    main()
