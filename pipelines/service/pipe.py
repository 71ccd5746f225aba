"""A replica's words to a gateway of the same machine, through a pipe: a message costs a twentieth of one of Ray's.

Ray's stream stays open beside it: it opens the pipe, and tells who has died and that nothing more will come. Where the
two cannot share a pipe, messages go that way too. There is no file to clean up: the gateway makes the pipe, and the
replica opens it under /proc, as it may open what another process of its own user has.
"""

import asyncio
import os
import pickle
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from pipelines.service.calls import Heard

BOOT = Path("/proc/sys/kernel/random/boot_id")  # a machine's name, as long as it is up
HEAD = Struct("<I")  # before each message: its bytes
PIECE = 1 << 16  # bytes that are read at a time; a pipe holds as many


@dataclass(frozen=True, slots=True)
class Address:
    """Of a pipe's writing end. inode: what lies there, so that no other process's file is taken for it."""

    boot: str
    process: int
    file: int
    inode: int


class Listener:
    """A gateway's end. For one event loop; close it when Ray's stream has ended."""

    def __init__(self, hear: Callable[[Sequence[Heard]], None]) -> None:
        self._hear = hear
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = bytearray()  # of a message that is not whole
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read, self.read)

    @property
    def address(self) -> Address | None:
        """For `Speaker.at`; None where there is no /proc."""
        try:
            boot = BOOT.read_text()
        except OSError:
            return None
        return Address(boot, os.getpid(), self._write, os.fstat(self._write).st_ino)

    def read(self) -> None:
        """Hands on all that is there. The loop calls it, and who has seen Ray's stream end, so that nothing is missed.

        Of a replica that died while it wrote, the end of the last message is missing; it is dropped.
        """
        try:
            while data := os.read(self._read, PIECE):
                self._rest += data
                if len(data) < PIECE:
                    break
        except BlockingIOError:
            pass
        while len(self._rest) >= HEAD.size:
            end = HEAD.size + HEAD.unpack_from(self._rest)[0]
            if len(self._rest) < end:
                break
            message = pickle.loads(self._rest[HEAD.size : end])
            del self._rest[:end]
            self._hear(message)

    def close(self) -> None:
        """A replica that still speaks is told so by its next message."""
        self._loop.remove_reader(self._read)
        os.close(self._read)
        os.close(self._write)


class Speaker:
    """A replica's end. It never waits: what the gateway has not read when the pipe is full stays here until it has."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._rest = bytearray()
        self._loop = asyncio.get_running_loop()

    @classmethod
    def at(cls, address: Address | None) -> "Speaker | None":
        """None where the address is another machine's, container's or user's."""
        if address is None:
            return None
        path = f"/proc/{address.process}/fd/{address.file}"
        try:
            there = os.stat(path)
            if BOOT.read_text() != address.boot or not stat.S_ISFIFO(there.st_mode) or there.st_ino != address.inode:
                return None
            return cls(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None

    @property
    def busy(self) -> bool:
        """Whether something is left to be written."""
        return bool(self._rest)

    def say(self, message: Sequence[Heard]) -> None:
        """Raises BrokenPipeError when nobody listens any more."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._rest += HEAD.pack(len(data)) + data
        self._flush()

    def close(self) -> None:
        """What is left is not said."""
        self._loop.remove_writer(self._file)
        os.close(self._file)

    def _flush(self) -> None:
        """Raises BrokenPipeError."""
        try:
            while self._rest:
                del self._rest[: os.write(self._file, self._rest)]
        except BlockingIOError:
            self._loop.add_writer(self._file, self._go_on)
        else:
            self._loop.remove_writer(self._file)

    def _go_on(self) -> None:
        try:
            self._flush()
        except BrokenPipeError:
            self._rest.clear()  # the next `say` finds out
            self._loop.remove_writer(self._file)
