"""A chat in the terminal, with any service of OpenAI's shape. Without a terminal it answers the lines of its input."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from nanochat.chat import Message
from pipelines.service.client import Client, End, ServiceError

HELP = """\
/new                begin again with an empty history
/system TEXT        what the model is told first; begins again. Without TEXT: nothing
/temperature N      0: always the likeliest word; the larger, the more surprising. Without N: the service's own
/quit               leave (so do Ctrl-D, and Ctrl-C twice)
/help               this
Ctrl-C stops an answer."""


class _Quit(Exception):  # noqa: N818  not an error
    """The user wants to leave."""


@dataclass
class _Chat:
    """One conversation and its settings."""

    client: Client
    model: str
    out: TextIO
    terminal: bool
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def ask(self, question: str) -> None:
        """Shows the answer as it comes. A question whose answer was stopped stays with what there was of it."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        turns: list[Message] = [*self.turns, {"role": "user", "content": question}]
        text, began = "", time.monotonic()
        pieces = self.client.ask(self.model, [*system, *turns], **self.settings)
        try:
            for piece in pieces:
                if isinstance(piece, End):
                    self.say(self._remark(piece, time.monotonic() - began))
                else:
                    text += piece
                    self.say(piece)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            self.say(" [stopped]\n")
        except ServiceError as error:
            self.say(f"\n[{error}]\n")
            return
        self.turns = [*turns, {"role": "assistant", "content": text}]

    def _remark(self, end: End, seconds: float) -> str:
        if not self.terminal:
            return "\n"
        cut = "; cut off at its longest" if end.finish == "length" else ""
        return f"\n  ({end.reply_tokens} tokens, {end.reply_tokens / seconds:.0f} tokens/s{cut})\n"


def chat(url: str, key: str | None = None) -> int:
    """Talks until the input ends. Returns 0, or 1 with one sentence if the service cannot be reached."""
    try:
        with Client(url, key) as client:
            card = client.model()
            terminal = sys.stdin.isatty() and sys.stdout.isatty()
            talk = _Chat(client, card["id"], sys.stdout, terminal)
            if terminal:
                talk.say(f"{card['id']} at {client.url}; /help says what else you can type\n")
            for line in _lines(terminal):
                _obey(talk, line)
    except _Quit:
        return 0
    except ServiceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _lines(terminal: bool) -> Iterator[str]:
    """The lines of the input. Ctrl-C at an empty prompt asks once, then leaves."""
    if not terminal:
        yield from sys.stdin
        return
    asked = False
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            if asked:
                sys.stdout.write("\n")
                return
            sys.stdout.write("\nCtrl-C again leaves")
            asked = True
            continue
        asked = False
        yield line


def _obey(talk: _Chat, line: str) -> None:
    """Runs one line: a command, or a question."""
    line = line.strip()
    if not line.startswith("/"):
        if line:
            talk.ask(line)
        return
    name, _, rest = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        talk.say(f"there is no {name}; /help lists what there is\n")
    else:
        command(talk, rest.strip())


def _new(talk: _Chat, rest: str) -> None:
    talk.turns = []
    talk.say("a new chat\n")


def _system(talk: _Chat, rest: str) -> None:
    talk.system, talk.turns = rest, []
    talk.say("a new chat; the model is told that first\n" if rest else "a new chat; the model is told nothing first\n")


def _temperature(talk: _Chat, rest: str) -> None:
    if not rest:
        talk.settings.pop("temperature", None)
        talk.say("temperature: the service's own\n")
        return
    try:
        value = float(rest)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        talk.say(f"temperature is {rest!r}; it must be a number, 0 to 2\n")
        return
    talk.settings["temperature"] = value
    talk.say(f"temperature: {value:g}\n")


def _help(talk: _Chat, rest: str) -> None:
    talk.say(f"{HELP}\n")


def _quit(talk: _Chat, rest: str) -> None:
    raise _Quit


COMMANDS: dict[str, Callable[[_Chat, str], None]] = {
    "/new": _new,
    "/system": _system,
    "/temperature": _temperature,
    "/help": _help,
    "/quit": _quit,
}
