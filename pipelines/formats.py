"""Documents and chats out of one open file: parquet, jsonl or txt, the latter two also gzipped.

- parquet: one row a document, column `text` or `messages`; `name` if there is one.
- jsonl: one object a line, with the same fields.
- txt: the file is one document; if it holds more than a million characters, it is cut at the first blank line after
  every 64,000. Paragraphs alone would be too short to learn from.

Everything streams: no more than one batch of rows or one piece of text is held.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

from nanochat.chat import check_messages
from pipelines.documents import Format, SourceDoc, SourceError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
BATCH_ROWS = 64
WHOLE_CHARS = 1_000_000  # a txt file up to this long is one document
PIECE_CHARS = 64_000  # least length of a piece of a longer one
LINE_CHARS = 4 * PIECE_CHARS  # a piece without a blank line ends here at the latest
FIELD = {"text": "text", "chat": "messages"}


def read_rows(uri: str, file: BinaryIO, form: Format, start: int, stop: int | None) -> Iterator[SourceDoc]:
    """Documents start..stop of an open file. SourceError names the file, and the row (from 1) at fault."""
    name = uri.rpartition("/")[2]
    with _named(uri):
        if uri.endswith(".parquet"):
            rows = _parquet(uri, file, form, start, stop)
        else:
            rows = islice(_lines(uri, file, form), start, stop)
        for number, row in enumerate(rows, start + 1):
            yield _document(uri, number, row, form, f"{name}:{number}")


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """What the readers find wrong with a file, as one sentence that names it."""
    import pyarrow as pa

    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{uri} is truncated or damaged (gzip): {error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri} is not UTF-8: {error.reason} at byte {error.start} of a block read") from error
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{uri} is truncated or damaged: {str(error).splitlines()[0]}") from error


def _document(uri: str, number: int, row: dict[str, Any], form: Format, name: str) -> SourceDoc:
    where = f"{uri}: row {number}"
    if FIELD[form] not in row:
        raise SourceError(f"{where} has no field `{FIELD[form]}`; it has: {', '.join(row) or 'none'}")
    if isinstance(row.get("name"), str):
        name = row["name"]
    if form == "text":
        return SourceDoc(name, text=_text(where, row["text"]))
    try:
        messages = check_messages(row["messages"])
    except ValueError as error:
        raise SourceError(f"{where} is no chat: {error}") from error
    if not any(message["role"] == "assistant" for message in messages):
        raise SourceError(f"{where} is no chat: the assistant says nothing in it")
    return SourceDoc(name, messages=messages)


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{where} holds {type(value).__name__} where text is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{where} holds half a character (a lone surrogate) at position {error.start}") from error
    return value


def _parquet(uri: str, file: BinaryIO, form: Format, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    columns = table.schema_arrow.names
    if FIELD[form] not in columns:
        raise SourceError(f"{uri} has no column `{FIELD[form]}`; it has: {', '.join(columns)}")
    wanted = [column for column in (FIELD[form], "name") if column in columns]
    stop = table.metadata.num_rows if stop is None else min(stop, table.metadata.num_rows)
    at = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if at < stop and at + rows > start:
            batches = table.iter_batches(BATCH_ROWS, row_groups=[group], columns=wanted)
            found = (row for batch in batches for row in batch.to_pylist())
            yield from islice(found, max(0, start - at), stop - at)
        at += rows


def _lines(uri: str, file: BinaryIO, form: Format) -> Iterator[dict[str, Any]]:
    """Rows of a jsonl or txt file."""
    plain = gzip.GzipFile(fileobj=file) if uri.endswith(".gz") else io.BufferedReader(file)  # type: ignore[type-var]
    with io.TextIOWrapper(plain, encoding="utf-8", newline="\n") as text:
        if ".jsonl" in uri[-len(".jsonl.gz") :]:
            yield from _json_rows(uri, text)
        elif form == "text":
            for piece in _pieces(text):
                yield {"text": piece}
        else:
            raise SourceError(f"{uri} is text, so it holds no chats; use jsonl or parquet with `messages`")


def _json_rows(uri: str, lines: io.TextIOWrapper) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue  # many writers end a file with an empty line
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{uri}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise SourceError(f"{uri}: line {number} is {type(row).__name__}, not an object")
        yield row


def _pieces(text: io.TextIOWrapper) -> Iterator[str]:
    """The whole text, or pieces of it if it is long."""
    held: list[str] = []
    chars = 0
    for piece in _cut(text):
        if chars > WHOLE_CHARS:
            yield piece
            continue
        held.append(piece)
        chars += len(piece)
        if chars > WHOLE_CHARS:
            yield from held
            held = []
    if held:
        yield "".join(held)


def _cut(text: io.TextIOWrapper) -> Iterator[str]:
    lines: list[str] = []
    chars = 0
    while line := text.readline(LINE_CHARS):
        lines.append(line)
        chars += len(line)
        if chars >= LINE_CHARS or (chars >= PIECE_CHARS and not line.strip()):
            yield "".join(lines)
            lines, chars = [], 0
    if lines:
        yield "".join(lines)
