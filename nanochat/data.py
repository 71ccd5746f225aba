"""Batches as a function of (seed, step): which rows a step sees depends on no worker, no thread and no past.

An epoch is all rows of all windows: windows in an order drawn from (seed, epoch), taken sixteen at a time, and the
rows of those sixteen mixed. Steps walk the endless sequence of epochs, so any step is found without the ones before.
A row's input is `context` tokens, its targets the tokens that follow; what follows the end of a document is <|bos|>.

B rows, T positions of a row.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nanochat.files import Files
from nanochat.packing import Packing, pack
from nanochat.shards import Window, read_lengths, read_window
from nanochat.tokenizer import Vocabulary

GROUP = 16  # windows whose rows are mixed
KEPT = 2 * GROUP  # windows in memory: those of this group, and of the next


@dataclass(frozen=True)
class IndexedWindow:
    """Where one window lies, and how many rows it packs into."""

    name: str
    group: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Index:
    """What the loader must know of all shards before it reads one."""

    context: int
    chat: bool
    windows: tuple[IndexedWindow, ...]
    dropped: int  # tokens of chats that are longer than the context

    @property
    def rows(self) -> int:
        """Rows in one epoch."""
        return sum(window.rows for window in self.windows)

    @property
    def tokens(self) -> int:
        """Tokens in the shards, dropped ones included."""
        return sum(window.tokens for window in self.windows)

    @property
    def waste(self) -> float:
        """Share of an epoch's positions and dropped tokens that teaches nothing: empty positions, dropped chats."""
        spent = self.rows * self.context + self.dropped
        return 1 - (self.tokens - self.dropped) / spent

    def to_json(self) -> bytes:
        """Plain data, read by `from_json`."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Index":
        """What `to_json` wrote."""
        told = json.loads(data)
        windows = tuple(IndexedWindow(**window) for window in told.pop("windows"))
        return cls(windows=windows, **told)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows for one forward pass."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, -1 where nothing counts
    segments: Tensor | None = None  # (B, T) int32: positions see those of their own number; 0 is padding

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; if it is pinned, the copy is only queued, and nothing waits for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same in memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, do: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(do(self.tokens), do(self.targets), None if self.segments is None else do(self.segments))


def build_index(files: Files, names: Sequence[str], context: int, chat: bool) -> Index:
    """Count the rows of every window of the shards, from the lengths of the documents alone.

    ValueError if there is nothing to train on: no shard, or no chat that fits into the context.
    """
    windows: list[IndexedWindow] = []
    dropped = 0
    for name in names:
        for group, lengths in enumerate(read_lengths(files, name)):
            packing = pack(lengths, context, whole=chat)
            windows.append(IndexedWindow(name, group, int(lengths.sum()), packing.rows))
            dropped += packing.dropped
    index = Index(context, chat, tuple(windows), dropped)
    if index.rows == 0:
        what = f"all {index.tokens} tokens are in chats longer than {context}" if windows else "there are no shards"
        raise ValueError(f"nothing to train on: {what}")
    return index


class TokenLoader:
    """The batches of one rank. `step` may be called with any step, in any order; the next one is made ahead."""

    def __init__(  # noqa: PLR0913 (what, how much, and whose share of it)
        self,
        files: Files,
        index: Index,
        *,
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro_batch: int = 8,
        mask_documents: bool = False,  # texts too, as chats always, see nothing of the others in their row
        pin: bool = False,  # for a GPU: batches lie where it can copy them while it computes
    ) -> None:
        if batch_tokens < index.context or batch_tokens % index.context:
            near = max(1, round(batch_tokens / index.context)) * index.context
            raise ValueError(f"batch_tokens is {batch_tokens}, not a multiple of context {index.context}; use {near}")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; it must be from 0 to {world - 1}")
        if micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}; it must be at least 1")
        self.rows = batch_tokens // index.context  # of a global batch
        self._files = files
        self._index = index
        self._seed = seed
        self._share = slice(self.rows * rank // world, self.rows * (rank + 1) // world)
        self._micro_batch, self._pin = micro_batch, pin
        self._apart = mask_documents or index.chat
        self._window = lru_cache(maxsize=KEPT)(self._read)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._group = lru_cache(maxsize=2)(self._draw_group)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="next-step")
        self._far_ahead = ThreadPoolExecutor(1, thread_name_prefix="next-group")
        self._next: tuple[int, Future[tuple[list[Batch], int]]] | None = None

    def step(self, number: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of step `number` (from 0), and how many targets count in the global batch."""
        if self._next is not None and self._next[0] == number:
            made = self._next[1].result()
        else:
            made = self._ahead.submit(self._make, number).result()
        self._next = number + 1, self._ahead.submit(self._make, number + 1)
        return made

    def _make(self, number: int) -> tuple[list[Batch], int]:
        rows = self._rows_of(number)
        count = sum(window.count(row) for window, row in rows)
        mine = rows[self._share]
        size = self._micro_batch
        batches = [_batch(mine[at : at + size], self._apart) for at in range(0, len(mine), size)]
        return [batch.pinned() for batch in batches] if self._pin else batches, count

    def _rows_of(self, number: int) -> list[tuple["Rows", int]]:
        """Rows number * R to (number + 1) * R of the endless sequence of epochs."""
        found: list[tuple[Rows, int]] = []
        at, stop = number * self.rows, (number + 1) * self.rows
        while at < stop:
            epoch, offset = divmod(at, self._index.rows)
            _, ends = self._epoch(epoch)
            group = int(np.searchsorted(ends, offset, side="right"))
            begins = 0 if group == 0 else int(ends[group - 1])
            windows, rows = self._group(epoch, group)
            part = slice(offset - begins, offset - begins + stop - at)
            picked = zip(windows[part].tolist(), rows[part].tolist(), strict=True)
            found += [(self._window(window), row) for window, row in picked]
            at = number * self.rows + len(found)
        return found

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the windows, and where in the epoch each group of them ends."""
        order = _permutation(len(self._index.windows), (self._seed, epoch), (0, 0))
        rows = np.array([window.rows for window in self._index.windows], dtype=np.int64)[order]
        return order, np.cumsum(np.add.reduceat(rows, np.arange(0, len(rows), GROUP)))

    def _draw_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Window and row of every row of a group, mixed."""
        order, ends = self._epoch(epoch)
        windows = order[group * GROUP : (group + 1) * GROUP]
        later = order[(group + 1) * GROUP : (group + 2) * GROUP] if group + 1 < len(ends) else self._epoch(epoch + 1)[0]
        # Only to have them in memory in time; what goes wrong here goes wrong again, and is raised, where it is needed.
        self._far_ahead.submit(lambda: [self._window(window) for window in later[:GROUP].tolist()])
        sizes = [self._index.windows[window].rows for window in windows.tolist()]
        row = np.concatenate([np.arange(size) for size in sizes])
        mixed = _permutation(len(row), (self._seed, epoch), (1, group))
        return np.repeat(windows, sizes)[mixed], row[mixed]

    def _read(self, number: int) -> "Rows":
        told = self._index.windows[number]
        rows = Rows(read_window(self._files, told.name, told.group), self._index.context, chat=self._index.chat)
        if rows.packing.rows != told.rows:
            raise ValueError(
                f"{told.name} changed since the index was made: window {told.group} packs into "
                f"{rows.packing.rows} rows, the index says {told.rows}"
            )
        return rows


class Rows:
    """One window, packed: gives its rows."""

    def __init__(self, window: Window, context: int, *, chat: bool) -> None:
        if chat and window.mask is None:
            raise ValueError("these shards hold texts, not chats: they have no `mask`")
        self.packing: Packing = pack(window.lengths, context, whole=chat)
        self.context = context
        self.chat = chat
        # What follows a document is the next one's <|bos|>, so the window needs one more at its end.
        self._tokens = np.append(window.tokens, window.tokens[:1])
        self._counts: np.ndarray | None = None  # whether each token counts as a target
        if chat and window.mask is not None:
            self._counts = np.append(window.mask, False)
            self._counts[np.cumsum(window.lengths) - window.lengths] = False  # <|bos|> is nobody's word
            self._sums = np.concatenate([[0], np.cumsum(self._counts)])

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """Where each piece of a row begins in the window, and how long it is."""
        part = slice(self.packing.first[row], self.packing.first[row + 1])
        return list(zip(self.packing.start[part].tolist(), self.packing.length[part].tolist(), strict=True))

    def count(self, row: int) -> int:
        """How many targets of a row count."""
        pieces = self.pieces(row)
        if self._counts is None:
            return sum(length for _, length in pieces)
        return sum(int(self._sums[start + length + 1] - self._sums[start + 1]) for start, length in pieces)

    def fill(self, row: int, tokens: np.ndarray, targets: np.ndarray, segments: np.ndarray) -> None:
        """Write a row into (T,) arrays. Unused positions at its end: <|bos|>, target -1, segment 0."""
        at = 0
        tokens[:], targets[:], segments[:] = self._tokens[0], -1, 0
        for number, (start, length) in enumerate(self.pieces(row), 1):
            here, follows = slice(at, at + length), slice(start + 1, start + length + 1)
            tokens[here] = self._tokens[start : start + length]
            targets[here] = self._tokens[follows]
            if self._counts is not None:
                targets[here][~self._counts[follows]] = -1
            segments[here] = number
            at += length


def heldout_batches(
    files: Files, names: Sequence[str], context: int, rows_per_batch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Batch, Tensor]]:
    """Every held-out row once, with sizes (B, T) int32: bytes of each target, 0 where special or not counted.

    Batches are the same for any world; rank r gets the batches r, r + world, ...
    """
    token_bytes = np.append(Vocabulary.load(files).token_bytes(), np.int32(0))  # the last is for target -1
    number = 0
    for name in names:
        for group in range(len(read_lengths(files, name))):
            window = read_window(files, name, group)
            rows = Rows(window, context, chat=window.mask is not None)
            for at in range(0, rows.packing.rows, rows_per_batch):
                if number % world == rank:
                    some = range(at, min(at + rows_per_batch, rows.packing.rows))
                    batch = _batch([(rows, row) for row in some], rows.chat)
                    yield batch, torch.from_numpy(token_bytes[batch.targets.numpy()])
                number += 1


def _batch(rows: Sequence[tuple[Rows, int]], apart: bool) -> Batch:
    shape = len(rows), rows[0][0].context
    tokens, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    segments = np.empty(shape, dtype=np.int32)
    for number, (window, row) in enumerate(rows):
        window.fill(row, tokens[number], targets[number], segments[number])
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(segments) if apart else None)


def _permutation(size: int, key: tuple[int, int], counter: tuple[int, int]) -> np.ndarray:
    """A permutation of 0 .. size - 1 drawn from key and counter alone.

    Sorted raw Philox words (Salmon et al. 2011), since NumPy keeps those, and not `permutation`, across versions.
    """
    words = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array([0, 0, *counter], dtype=np.uint64))
    return np.argsort(words.random_raw(size), kind="stable")
