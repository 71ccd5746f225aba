"""What a source gives: files, documents and chats, and the errors that name the file at fault.

Nothing here reads anything; `stdlib` makes documents from this Python, `sources` reads them from files.
"""

from dataclasses import dataclass, field
from typing import Literal

from nanochat.chat import Message

Format = Literal["text", "chat"]


class SourceError(Exception):
    """A source cannot be read: one sentence that names the file and, where there is one, the remedy."""


class SourceFileChangedError(SourceError):
    """A file is gone, or is another than the one that was listed."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source as it was listed. `stamp` changes whenever the file does."""

    uri: str  # absolute path, s3://bucket/key, hf://datasets/..., or python-stdlib[-questions]
    bytes: int  # as it lies there, compressed or not
    stamp: str  # modification time in ns, hash of the content, or the identity of this Python


@dataclass(frozen=True)
class SourceDoc:
    """One document (`text`) or one chat (`messages`), never both."""

    name: str  # for the report; the file and row where the source has no better one
    text: str = ""
    messages: list[Message] = field(default_factory=list)

    @property
    def question(self) -> str:
        """The first thing that the user says in a chat."""
        return next(message["content"] for message in self.messages if message["role"] == "user")
