"""Token shards: parquet files of tokenized documents, one row a document, one row group a window.

A window is a run of consecutive documents of about a million tokens; packing looks no further than one. Columns:
`tokens` (begins with <|bos|>, has no end token), `length`, `bytes` (UTF-8 bytes of the text; of the assistant's words
in a chat), `name`, and for chats `mask` (1: the token counts where it is the target).
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat.files import File, Files

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

WINDOW_TOKENS = 1_000_000


@dataclass(frozen=True, eq=False)
class Doc:
    """One tokenized document or chat."""

    tokens: Sequence[int] | np.ndarray  # (n,), the first is <|bos|>
    bytes: int
    mask: Sequence[int] | np.ndarray | None = None  # (n,) for chats
    name: str = ""


@dataclass(frozen=True, eq=False)
class Window:
    """The documents of one row group, end to end."""

    tokens: np.ndarray  # (sum of lengths,) the smallest unsigned integers that fit
    lengths: np.ndarray  # (documents,) int64, each at least 1
    mask: np.ndarray | None  # (sum of lengths,) bool, for chats


def write_shard(
    files: Files, name: str, docs: Iterable[Doc], vocab_size: int, window_tokens: int = WINDOW_TOKENS
) -> File:
    """Write one shard in windows of at least `window_tokens`; the last window takes the remainder in.

    Holds two windows in memory. ValueError for a token outside of the vocabulary, a mask of another length than its
    document, chats mixed with texts, or no document at all.
    """
    import pyarrow.parquet as pq

    windows = _windows(docs, window_tokens)
    first = next(windows, None)
    if first is None:
        raise ValueError(f"{name}: a shard needs at least one document")
    schema = _schema(vocab_size, chat=first[0].mask is not None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.parquet")
        with pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
        ) as writer:
            for window in (first, *windows):
                writer.write_table(_table(name, window, schema, vocab_size), row_group_size=len(window))
        return files.put(name, path)


def read_documents(files: Files, names: Iterable[str]) -> Iterator[Doc]:
    """Every document of the shards, in order; holds one window in memory."""
    for name in names:
        with _parquet(files, name) as shard:
            for group in range(shard.num_row_groups):
                rows = shard.read_row_group(group)
                window = _window(name, rows)
                stops = np.cumsum(window.lengths)
                told = zip(rows["bytes"].to_pylist(), rows["name"].to_pylist(), strict=True)
                for (bytes_, document), start, stop in zip(told, stops - window.lengths, stops, strict=True):
                    mask = None if window.mask is None else window.mask[start:stop]
                    yield Doc(window.tokens[start:stop], bytes_, mask, document)


def read_lengths(files: Files, name: str) -> list[np.ndarray]:
    """Tokens of each document, (documents,) int64 for each window of a shard; reads nothing else."""
    with _parquet(files, name) as shard:
        columns = [shard.read_row_group(g, columns=["length"])["length"] for g in range(shard.num_row_groups)]
        return [column.to_numpy().astype(np.int64) for column in columns]


def read_window(files: Files, name: str, group: int) -> Window:
    """One window of a shard."""
    with _parquet(files, name) as shard:
        if group >= shard.num_row_groups:
            raise ValueError(f"{name} has {shard.num_row_groups} windows, but window {group} of it is wanted")
        columns = [column for column in ("tokens", "length", "mask") if column in shard.schema_arrow.names]
        return _window(name, shard.read_row_group(group, columns=columns))


@contextmanager
def _parquet(files: Files, name: str) -> Iterator["pq.ParquetFile"]:
    """A shard, open; whatever pyarrow finds wrong with it becomes a ValueError that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with files.open(name) as file:
        try:
            yield pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{name} is damaged or no token shard: {error}") from error


def _window(name: str, rows: "pa.Table") -> Window:
    lists = rows["tokens"].combine_chunks()
    lengths = rows["length"].to_numpy().astype(np.int64)
    if not np.array_equal(lists.value_lengths().to_numpy(), lengths):
        raise ValueError(f"{name} is damaged: its lengths are not those of its documents")
    mask = None
    if "mask" in rows.column_names:
        mask = rows["mask"].combine_chunks().flatten().to_numpy().astype(bool)
        if len(mask) != lengths.sum():
            raise ValueError(f"{name} is damaged: its masks are not as long as its documents")
    return Window(lists.flatten().to_numpy(), lengths, mask)


def _windows(docs: Iterable[Doc], window_tokens: int) -> Iterator[list[Doc]]:
    full: list[Doc] = []
    growing: list[Doc] = []
    tokens = 0
    for doc in docs:
        growing.append(doc)
        tokens += len(doc.tokens)
        if tokens >= window_tokens:
            if full:
                yield full
            full, growing, tokens = growing, [], 0
    if full or growing:
        yield full + growing


def _schema(vocab_size: int, *, chat: bool) -> "pa.Schema":
    import pyarrow as pa

    token = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    columns = [("tokens", pa.list_(token)), ("length", pa.int32()), ("bytes", pa.int64()), ("name", pa.string())]
    return pa.schema([*columns, ("mask", pa.list_(pa.uint8()))] if chat else columns)


def _table(name: str, docs: list[Doc], schema: "pa.Schema", vocab_size: int) -> "pa.Table":
    import pyarrow as pa

    chat = "mask" in schema.names
    for doc in docs:
        if len(doc.tokens) == 0 or (doc.mask is not None) != chat:
            raise ValueError(f"{name}: {doc.name!r} is empty, or a chat among texts, or a text among chats")
        if doc.mask is not None and len(doc.mask) != len(doc.tokens):
            raise ValueError(f"{name}: {doc.name!r} has {len(doc.tokens)} tokens, but a mask of {len(doc.mask)}")
    tokens = np.concatenate([np.asarray(doc.tokens, dtype=np.int64) for doc in docs])
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"{name}: token {tokens.max()} is not in a vocabulary of {vocab_size}")
    lengths = np.array([len(doc.tokens) for doc in docs], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def lists(values: np.ndarray, column: str) -> Any:
        return pa.ListArray.from_arrays(offsets, pa.array(values, type=schema.field(column).type.value_type))

    columns = {
        "tokens": lists(tokens, "tokens"),
        "length": lengths.astype(np.int32),
        "bytes": [doc.bytes for doc in docs],
        "name": [doc.name for doc in docs],
    }
    if chat:
        columns["mask"] = lists(np.concatenate([np.asarray(doc.mask, dtype=np.uint8) for doc in docs]), "mask")
    return pa.table(columns, schema=schema)
