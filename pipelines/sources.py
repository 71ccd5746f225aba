"""Sources of a pipeline file: a path or glob (local, s3://, hf://), or the two that every Python brings along.

Listing is cheap and is kept with what was made; reading checks the file against its listing and streams.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from nanochat.files import Files
from pipelines import stdlib
from pipelines.documents import Format, SourceDoc, SourceError, SourceFile, SourceFileChangedError
from pipelines.formats import ENDINGS, read_rows
from pipelines.outside import find, look, open_file

__all__ = [
    "SourceDoc",
    "SourceError",
    "SourceFile",
    "SourceFileChangedError",
    "holdout_score",
    "listing",
    "materialise",
    "read",
    "sizes",
]

STDLIB, QUESTIONS = "python-stdlib", "python-stdlib-questions"


class AddressedFiles(Files, Protocol):
    """Files that tell where they lie, so that a worker on another host can read them as a source."""

    def uri(self, name: str) -> str:
        """Absolute path or s3:// address of a file."""


def listing(source: str, base: Path) -> list[SourceFile]:
    """The files of a source, sorted by address; reads none of them.

    base: the folder that relative paths begin in. SourceError if nothing matches, or a file is of no known kind.
    """
    if source in (STDLIB, QUESTIONS):
        return [SourceFile(source, 0, stdlib.identity())]
    files = find(source, base)
    if not files:
        raise SourceError(f"nothing matches {source} (relative paths begin in {base}; a folder needs /*.ENDING)")
    unknown = [file.uri for file in files if not file.uri.endswith(ENDINGS)]
    if unknown:
        raise SourceError(f"{unknown[0]} is of no known kind; name files that end in {', '.join(ENDINGS)}")
    return files


def materialise(source: str, store: AddressedFiles) -> list[SourceFile]:
    """The stdlib source as a parquet file in `store`, written once for each Python; it can be read from any host."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stamp = hashlib.sha256(stdlib.identity().encode()).hexdigest()[:16]
    name = f"{source}-{stamp}.parquet"
    if name not in store.list(name):
        rows: list[dict[str, object]]
        if source == STDLIB:
            rows = [{"name": document, "text": text} for document, text in stdlib.documents()]
        else:
            rows = [{"name": chat, "messages": messages} for chat, messages in stdlib.questions()]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", row_group_size=1000)
            store.put(name, path)
    file = look(store.uri(name))
    if file is None:
        raise SourceError(f"{store.uri(name)} was written a moment ago, but cannot be found there")
    return [file]


def read(file: SourceFile, format: Format, start: int = 0, stop: int | None = None) -> Iterator[SourceDoc]:
    """Documents start..stop of a listed file, or chats; holds a few at a time.

    SourceFileChangedError if the file is not the one that was listed, SourceError if it is damaged.
    """
    if file.uri in (STDLIB, QUESTIONS):
        if file.stamp != stdlib.identity():
            raise SourceFileChangedError(f"{file.uri} was listed by {file.stamp}, but this is {stdlib.identity()}")
        yield from islice(_stdlib(file.uri, format), start, stop)
        return
    with open_file(file) as opened:
        yield from read_rows(file.uri, opened, format, start, stop)


def sizes(file: SourceFile, format: Format) -> Iterator[tuple[int, float]]:
    """For each document: UTF-8 bytes of its text (of all messages of a chat), and its hold-out score."""
    for document in read(file, format):
        if format == "text":
            yield len(document.text.encode()), holdout_score(document.text)
        else:
            said = sum(len(message["content"].encode()) for message in document.messages)
            yield said, holdout_score(document.question)


def holdout_score(text: str) -> float:
    """A number in [0, 1) that depends on the text alone; a document is held out if it is below the share."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 11) / (1 << 53)


def _stdlib(source: str, form: Format) -> Iterator[SourceDoc]:
    if (source == STDLIB) != (form == "text"):
        kind, other = ("texts", QUESTIONS) if source == STDLIB else ("chats", STDLIB)
        raise SourceError(f"{source} holds {kind}; `format: {form}` needs {other} or files of your own")
    if source == STDLIB:
        return (SourceDoc(name, text=text) for name, text in stdlib.documents())
    return (SourceDoc(name, messages=messages) for name, messages in stdlib.questions())
