"""Held-out text as rows of tokens, for bits per byte: plain files, or the held-out shards of a corpus."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanochat.data import heldout_batches
from nanochat.files import Folder
from nanochat.tokenizer import Vocabulary


@dataclass(frozen=True, eq=False)
class Row:
    """At most one context of tokens; the model sees nothing before it."""

    tokens: npt.NDArray[np.int32]  # (T,)
    targets: npt.NDArray[np.int64]  # (T,)
    sizes: npt.NDArray[np.int32]  # (T,) UTF-8 bytes of each target, 0 for a special token


def text_rows(paths: Iterable[Path], vocabulary: Path, context: int) -> Iterator[Row]:
    """Rows of all paths. A folder holds shards as the pipeline makes them, and gives the evaluation's own rows.

    vocabulary: the folder of a bundle.  ValueError for a folder without held-out texts or an empty file.
    """
    vocab = Vocabulary.load(Folder(vocabulary))
    for path in paths:
        yield from _shard_rows(path, context) if path.is_dir() else _file_rows(path, vocab, context)


def _shard_rows(path: Path, context: int) -> Iterator[Row]:
    names = Folder(path).list("heldout-")
    if not names:
        raise ValueError(f"--text {path}: no heldout-*.parquet; name the data folder of a corpus, or text files")
    for batch, sizes in heldout_batches(Folder(path), names, context, 1):
        if batch.segments is not None:
            raise ValueError(f"--text {path}: these shards hold chats; bits per byte are measured on texts")
        counts = batch.targets[0] >= 0  # not the empty end of a window's last row
        yield Row(batch.tokens[0][counts].int().numpy(), batch.targets[0][counts].numpy(), sizes[0][counts].numpy())


def _file_rows(path: Path, vocab: Vocabulary, context: int) -> Iterator[Row]:
    tokens = np.array([vocab.special["<|bos|>"], *vocab.encode(path.read_text(encoding="utf-8"))])
    if len(tokens) == 1:
        raise ValueError(f"--text {path} is empty")
    sizes = vocab.token_bytes()
    for at in range(0, len(tokens) - 1, context):
        piece = tokens[at : at + context + 1]
        yield Row(piece[:-1].astype(np.int32), piece[1:].astype(np.int64), sizes[piece[1:]])
