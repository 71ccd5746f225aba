"""The keys of clients: a file of names with the SHA-256 of each key and what it may ask a minute.

A key is 256 random bits, so its plain hash cannot be guessed back; a salted, slow hash is for what people make up.
Knows no HTTP. What goes over a key's limits is refused in rates.py.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from pipelines.spec import Spec
from pipelines.yamlfile import Problem, read_yaml

PREFIX = "nc-"  # lets people and scanners for leaked secrets see what it is
RANDOM_BYTES = 32
MOST_CHARACTERS = 256  # of what a client sends; a longer one is no key of ours
NAME, NAME_IN_WORDS = r"[A-Za-z0-9_.@-]{1,64}", "it has 1 to 64 letters, digits, '.', '@', '_' or '-'"
REMEDY = "`nanochat key NAME` makes a key and prints its entry"


class KeyFileError(ValueError):
    """A key file that cannot be used. The message names every problem, and shows no value of the file."""


class Limits(Spec):
    """One entry of the file."""

    model_config = ConfigDict(hide_input_in_errors=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: PositiveInt | None = None  # None: as many as come
    tokens_per_minute: PositiveInt | None = None  # of prompts and replies


Entries = TypeAdapter(dict[Annotated[str, StringConstraints(pattern=f"^{NAME}$")], Limits])


@dataclass(frozen=True, slots=True)
class Key:
    """Who asks. It does not hold the key itself."""

    name: str
    requests_per_minute: int | None
    tokens_per_minute: int | None


class Keys:
    """All that are known. entries: as the file has them."""

    def __init__(self, entries: Mapping[str, Limits]) -> None:
        self.entries = {name: entry.model_dump() for name, entry in entries.items()}
        self._known = [
            (bytes.fromhex(entry.sha256), Key(name, entry.requests_per_minute, entry.tokens_per_minute))
            for name, entry in entries.items()
        ]

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> "Keys":
        """From what `entries` holds."""
        return cls(Entries.validate_python(entries))

    def find(self, key: str) -> Key | None:
        """Compares with all, whichever it is, so that the time it takes says nothing."""
        if len(key) > MOST_CHARACTERS:
            return None
        digest, found = sha256(key.encode(errors="surrogateescape")).digest(), None
        for known, owner in self._known:
            if compare_digest(known, digest):
                found = owner
        return found


def read_keys(path: Path) -> Keys:
    """The keys of a YAML or JSON file. Raises KeyFileError."""
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KeyFileError(f"{path}: no such file; {REMEDY}") from None
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: not UTF-8 text (byte {error.start}); is it a key file?") from None
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}") from None
    problems: list[Problem] = list(document.problems)
    entries: dict[str, Limits] = {}
    if not problems:
        try:
            entries = Entries.validate_python(document.data)
        except ValidationError as error:
            problems = [(found["loc"], _in_words(found["loc"], found["msg"])) for found in error.errors()]
        problems += _same(entries)
    if problems:
        raise KeyFileError("\n".join(f"{path}:{document.line(loc)}: {said}" for loc, said in problems))
    if not entries:
        raise KeyFileError(f"{path}: holds no key, so nobody could ask; {REMEDY}")
    return Keys(entries)


def open_to_others(path: Path) -> str | None:
    """A warning, if other users of the machine can read the file."""
    mode = path.stat().st_mode & 0o777
    return f"{path} can be read by other users (mode {mode:o}): chmod 600 {path}" if mode & 0o077 else None


def make_key() -> str:
    """A new one; nothing remembers it."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def entry_of(name: str, key: str) -> str:
    """The line of the key file for a key. Raises KeyFileError if the name cannot be one."""
    if not re.fullmatch(NAME, name):
        raise KeyFileError(f"{name!r:.80} is no name for a key: {NAME_IN_WORDS}")
    entry = Limits(sha256=sha256(key.encode()).hexdigest())
    return f"{name}: {json.dumps(entry.model_dump())}"


def _same(entries: dict[str, Limits]) -> list[Problem]:
    names: dict[str, str] = {}
    return [
        ((name, "sha256"), f"{name} has the key of {first}; give each its own")
        for name, entry in entries.items()
        if (first := names.setdefault(entry.sha256, name)) != name
    ]


def _in_words(loc: tuple[str | int, ...], said: str) -> str:
    """What is wrong; never the value, which may be a key that was written where its hash should be."""
    place = ".".join(str(part) for part in loc if part != "[key]")
    if loc[-1:] == ("sha256",):
        said = f"must be the SHA-256 of a key in hexadecimal, 64 of 0-9 and a-f; {REMEDY}"
    elif loc[-1:] == ("[key]",):
        said = NAME_IN_WORDS
    elif not loc:
        said = f"must be names with their keys; {REMEDY}"
    return f"{place}: {said}" if place else said
