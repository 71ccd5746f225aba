"""The ranks of a training that is measured, seen from outside; and such a group without Ray, begun by torchrun."""

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from nanochat.bench.trainer import BATCH_TOKENS
from pipelines.bench.ranks import Hello, RankSetup, Took
from pipelines.processes import descendants

START_S = 180  # ranks that take longer are not coming
END_S = 60
LAST_WORDS_S = 10
LOOK_S = 0.5  # at whether those that are waited for are still alive


class Group:
    """Ranks that wait to be asked for steps."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.began = time.time()
        self.entered = 0.0  # when the function of the last rank began
        self.pids: set[int] = set()
        self._links: list[Connection] = []

    def meet(self, server: socket.socket, setup: RankSetup, alive: Callable[[], bool]) -> None:
        """Waits for all ranks. RuntimeError if they do not come."""
        server.settimeout(LOOK_S)
        found: list[tuple[Hello, Connection]] = []
        while len(found) < self.world:
            try:
                link = Connection(server.accept()[0].detach())
                found.append((link.recv(), link))
            except TimeoutError as error:
                if not alive() or time.time() - self.began > START_S:
                    raise RuntimeError(
                        f"{len(found)} of the {self.world} ranks of a training came; what the others said is above"
                    ) from error
        found.sort(key=lambda pair: pair[0].rank)
        self.pids = {hello.pid for hello, _ in found}
        self.entered = max(hello.entered for hello, _ in found)
        self._links = [link for _, link in found]
        for link in self._links:
            link.send(setup)

    def steps(self, count: int) -> Took:
        """Does so many; what they cost by the clock of the first rank."""
        try:
            for link in self._links:
                link.send(count)
            took: list[Took] = [link.recv() for link in self._links]
        except (EOFError, OSError) as error:
            raise RuntimeError("a rank ended while it trained; what it said is above") from error
        time.sleep(0.05)  # threads that spin a while for their next task go to sleep
        return took[0]

    def rate(self, count: int) -> float:
        """Tokens/s of so many steps."""
        return count * BATCH_TOKENS / self.steps(count).seconds

    def end(self) -> None:
        """Tells the ranks that there is nothing more to do."""
        for link in self._links:
            try:
                link.send(0)
            except OSError:
                continue  # it has ended already
            link.close()


@contextmanager
def listening(folder: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket in a folder that nobody else can read, and its path."""
    door = str(folder / uuid.uuid4().hex[:8])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(door)
        server.listen()
        yield server, door


@contextmanager
def torchrun(world: int, setup: RankSetup, folder: Path) -> Iterator[tuple[Group, set[int]]]:
    """A group as people without Ray begin it, and all its processes."""
    with listening(folder) as (server, door):
        group = Group(world)
        run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m", "pipelines.bench.ranks"]
        threads = f"OMP_NUM_THREADS={setup.threads}"  # else torchrun warns that it sets this to 1
        process = subprocess.Popen(["env", threads, sys.executable, "-m", *run, door], stdout=subprocess.DEVNULL)
        try:
            group.meet(server, setup, lambda: process.poll() is None)
            yield group, {process.pid, *descendants(process.pid)}
        except BaseException as error:
            if isinstance(error, RuntimeError):  # a rank has ended, and says why
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_WORDS_S)
            process.terminate()  # and it ends its ranks
            raise
        finally:
            group.end()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait(END_S)
