"""What a gateway and a replica of one machine say to each other: through pipes a message costs a twentieth of Ray's.

Ray's stream stays open beside them: it opens the line, tells who has died, and that nothing more will come. Where the
two cannot share a pipe, all goes by Ray. There is no file to clean up: the gateway makes the pipes, and the replica
opens them under /proc, as it may open what another process of its own user has.
"""

import asyncio
import os
import pickle
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

BOOT = Path("/proc/sys/kernel/random/boot_id")  # a machine's name, as long as it is up
HEAD = Struct("<I")  # before each message: its bytes
PIECE = 1 << 16  # bytes that are read at a time; a pipe holds as many

Hear = Callable[[Any], None]  # is called with a message


@dataclass(frozen=True, slots=True)
class Address:
    """Of a line's far end. inode: what lies there, so that no other process's file is taken for it."""

    boot: str
    process: int
    reads: tuple[int, int]  # file, inode
    writes: tuple[int, int]


class Line:
    """One end, for one event loop. It never waits: what the other has not read when the pipe is full stays here."""

    def __init__(self, read: int, write: int, hear: Hear, far: tuple[int, ...] = ()) -> None:
        self._read, self._write, self._hear, self._far = read, write, hear, far
        self._heard = bytearray()  # of a message that is not whole
        self._unsaid = bytearray()
        self._lock = threading.Lock()  # of what is unsaid, and of its file
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(read, self.read)

    @classmethod
    def made(cls, hear: Hear) -> "tuple[Line, Address | None]":
        """The near end, and where the far one is; None where there is no /proc."""
        read, far_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        far_read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        line = cls(read, write, hear, (far_read, far_write))
        try:
            boot = BOOT.read_text()
        except OSError:
            return line, None
        reads, writes = ((file, os.fstat(file).st_ino) for file in line._far)
        return line, Address(boot, os.getpid(), reads, writes)

    @classmethod
    def at(cls, address: Address | None, hear: Hear) -> "Line | None":
        """The far end; None where the address is another machine's, container's or user's."""
        if address is None:
            return None
        files: list[int] = []
        try:
            if BOOT.read_text() != address.boot:
                return None
            for end, flag in ((address.reads, os.O_RDONLY), (address.writes, os.O_WRONLY)):
                files.append(_opened(address.process, *end, flag))
        except OSError:
            for file in files:
                os.close(file)
            return None
        return cls(files[0], files[1], hear)

    @property
    def busy(self) -> bool:
        """Whether something is left to be written."""
        return bool(self._unsaid)

    def say(self, message: Any) -> None:
        """Anything that can be pickled, from any thread. Raises BrokenPipeError when nobody has the other end."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            waits = bool(self._unsaid)
            self._unsaid += HEAD.pack(len(data)) + data
            if not waits and not self._flush():
                self._loop.call_soon_threadsafe(self._wait)

    def read(self) -> None:
        """Hands on all that is there. The loop calls it, and who has seen Ray's stream end, so that nothing is missed.

        Of one that died while it wrote, the end of the last message is missing; it is dropped.
        """
        with suppress(BlockingIOError):
            while data := os.read(self._read, PIECE):
                self._heard += data
                if len(data) < PIECE:
                    break
            else:  # the other end is closed
                self._loop.remove_reader(self._read)
        while len(self._heard) >= HEAD.size:
            end = HEAD.size + HEAD.unpack_from(self._heard)[0]
            if len(self._heard) < end:
                break
            message = pickle.loads(self._heard[HEAD.size : end])
            del self._heard[:end]
            self._hear(message)

    def close(self) -> None:
        """What is left is not said. Who still speaks at the other end is told so by the next message."""
        self._loop.remove_reader(self._read)
        self._loop.remove_writer(self._write)
        with self._lock:
            self._closed = True
            for file in (self._read, self._write, *self._far):
                os.close(file)

    def _flush(self) -> bool:
        """Whether all is said. Raises BrokenPipeError, and forgets what was left."""
        try:
            while self._unsaid:
                del self._unsaid[: os.write(self._write, self._unsaid)]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._unsaid.clear()
            raise
        return True

    def _wait(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._write, self._go_on)

    def _go_on(self) -> None:
        done = True
        with self._lock, suppress(BrokenPipeError):  # the next `say` finds out
            done = self._flush()
        if done:
            self._loop.remove_writer(self._write)


def _opened(process: int, file: int, inode: int, flag: int) -> int:
    """An end of a pipe that another process has. OSError if something else lies there."""
    path = f"/proc/{process}/fd/{file}"
    there = os.stat(path)
    if not stat.S_ISFIFO(there.st_mode) or there.st_ino != inode:
        raise FileNotFoundError(path)
    return os.open(path, flag | os.O_NONBLOCK | os.O_CLOEXEC)
