"""The terminal chat, as a program of its own: with lines from a pipe, and on a terminal."""

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipelines.service.protocol import ReplicaLostError
from pipelines.service.web import make_app
from tests.serving import CARD, ByteVocabulary, Scripted, running

PROGRAM = [sys.executable, "-c", "import sys; from pipelines.service.chat import chat; sys.exit(chat(sys.argv[1]))"]


def piped(url: str, lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, url], input=lines, capture_output=True, text=True, timeout=60)


def texts(backend: Scripted) -> list[str]:
    """Each prompt, its special tokens as |."""
    return ["".join(chr(token) if token < 256 else "|" for token in prompt) for prompt, _ in backend.asked]


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, url: str) -> None:
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [*PROGRAM, url], stdin=other, stdout=other, stderr=other, start_new_session=True
        )
        os.close(other)
        self.seen = ""

    def wait(self, text: str) -> None:
        """Until `text` has come since the last call."""
        end = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} never came: {self.seen!r}"
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._end, 4096).decode(errors="replace")
                except OSError:  # Linux's way to say that the other side is closed
                    pytest.fail(f"it ended without {text!r}: {self.seen!r}")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@contextmanager
def terminal(backend: Scripted) -> Iterator[Terminal]:
    with running(make_app(backend, ByteVocabulary(), CARD)) as url:
        opened = Terminal(url)
        try:
            opened.wait("/help says what else you can type")
            yield opened
        finally:
            opened.close()


def test_lines_of_a_pipe_are_answered_with_their_history() -> None:
    backend = Scripted("Jä!")
    with running(make_app(backend, ByteVocabulary(), CARD)) as url:
        done = piped(url, "one\n\ntwo\n/temperature 0.5\n/new\nthree\n/system Be kind.\nfour\n/quit\nfive\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Jä!\n") == 4
    assert texts(backend) == [
        "||one||",
        "||one||Jä!||two||".encode().decode("latin-1"),
        "||three||",
        "||Be kind.\n\nfour||",
    ]
    assert [params.temperature for _, params in backend.asked] == [0.8, 0.8, 0.5, 0.5]


def test_wrong_commands_are_explained() -> None:
    with running(make_app(Scripted("ok"), ByteVocabulary(), CARD)) as url:
        done = piped(url, "/nwe\n/temperature hot\n/temperature 3\n/help\n")
    assert done.returncode == 0
    assert "there is no /nwe" in done.stdout
    assert "temperature is 'hot'" in done.stdout
    assert "temperature is '3'" in done.stdout
    assert "/system TEXT" in done.stdout


def test_errors_are_shown_and_leave_the_history_as_it_was() -> None:
    backend = Scripted("Hel", end=ReplicaLostError("killed"))
    with running(make_app(backend, ByteVocabulary(), CARD)) as url:
        done = piped(url, "one\n" + "x" * 500 + "\ntwo\n")
    assert done.returncode == 0
    assert "is gone (killed); ask again" in done.stdout
    assert "this model's context is 128 tokens" in done.stdout
    assert texts(backend) == ["||one||", "||two||"]


def test_nobody_there_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = piped(f"http://127.0.0.1:{port}", "hello\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"nobody answers at http://127.0.0.1:{port}; start the service: nanochat serve FILE --profile P\n"
    )
    for url in ("localhost", "http://[", "ftp://127.0.0.1/"):
        done = piped(url, "hello\n")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_ctrl_c_stops_an_answer_and_twice_leaves() -> None:
    backend = Scripted("z" * 5_000, pause_s=0.01)
    with terminal(backend) as screen:
        screen.type("go\n")
        screen.wait("zzz")
        screen.interrupt()
        screen.wait("[stopped]")
        screen.wait("> ")
        screen.interrupt()
        screen.wait("Ctrl-C again leaves")
        screen.wait("> ")
        screen.interrupt()
        assert screen.process.wait(10) == 0
    assert backend.closed == [True]


def test_on_a_terminal_the_speed_is_shown_and_ctrl_d_leaves() -> None:
    with terminal(Scripted("ok", end=None)) as screen:
        screen.type("hi\n")
        screen.wait("(2 tokens, ")
        screen.wait("cut off at its longest)")
        screen.wait("> ")
        screen.type("\x04")
        assert screen.process.wait(10) == 0
