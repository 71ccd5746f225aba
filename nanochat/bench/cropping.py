"""nanochat's own way of cutting documents into rows, to be compared with ours: nothing is padded, much is thrown away.

From nanochat at commit 92d63d4 (nanochat/dataloader.py, "bestfit"): a row takes the longest document of a buffer that
fits; when none does, the shortest one is cut to what is left of the row, and the rest of it is never seen.
"""

from collections.abc import Iterator

import numpy as np
import torch

from nanochat.data import Batch
from nanochat.files import Files
from nanochat.shards import read_documents

BUFFER = 1000  # documents


class CroppingLoader:
    """Batches of rows of `context` tokens, with the targets that follow. Step after step, from the first."""

    def __init__(self, files: Files, names: list[str], context: int, *, rows: int, micro_batch: int) -> None:
        self._context, self._rows, self._micro_batch = context, rows, micro_batch
        self._documents = self._endless(files, names)
        self._buffer: list[np.ndarray] = []
        self.seen = self.dropped = 0  # tokens

    def step(self) -> list[Batch]:
        """The next step's micro-batches."""
        rows = torch.from_numpy(np.stack([self._row() for _ in range(self._rows)]))
        parts = torch.split(rows, self._micro_batch)
        return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]

    def _row(self) -> np.ndarray:
        """(context + 1,) int64: the last one is a target only."""
        row = np.empty(self._context + 1, dtype=np.int64)
        at = 0
        while at < len(row):
            while len(self._buffer) < BUFFER:
                self._buffer.append(next(self._documents))
            room = len(row) - at
            lengths = np.array([len(document) for document in self._buffer])
            fitting = np.where(lengths <= room, lengths, 0)
            best = int(fitting.argmax()) if fitting.any() else int(lengths.argmin())
            taken = self._buffer.pop(best)
            part = taken[:room]
            row[at : at + len(part)] = part
            at += len(part)
            self.seen += len(part)
            self.dropped += len(taken) - len(part)
        return row

    @staticmethod
    def _endless(files: Files, names: list[str]) -> Iterator[np.ndarray]:
        while True:
            for document in read_documents(files, names):
                yield np.asarray(document.tokens, dtype=np.int64)
