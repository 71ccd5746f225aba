"""Documents into rows of equal length, inside one window.

Best-fit decreasing (Johnson 1974: at most 11/9 of the best number of rows). Where documents may be cut, the emptiest
rows are then cut up to fill the holes of the others, so that a window has as few rows as its tokens need.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

Piece = tuple[int, int]  # where it begins in the window's tokens, and how long it is


@dataclass(frozen=True, eq=False)
class Packing:
    """Pieces of documents in rows. Row r holds the pieces first[r] .. first[r + 1], one after the other."""

    start: np.ndarray  # (pieces,) int64, where the piece begins in the window's tokens
    length: np.ndarray  # (pieces,) int64, its positions
    first: np.ndarray  # (rows + 1,) int64
    dropped: int  # tokens of documents that are longer than a row and must not be cut

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.first) - 1


def pack(lengths: np.ndarray, context: int, *, whole: bool) -> Packing:
    """Pack documents of `lengths` tokens, end to end in a window, into rows of `context` positions.

    whole: never cut a document, drop it if it is too long (chats); else cut it into rows and a rest (text).
    """
    offsets = np.cumsum(lengths) - lengths
    if whole:
        fits = lengths <= context
        full, starts, rests = np.empty(0, dtype=np.int64), offsets[fits], lengths[fits]
        dropped = int(lengths[~fits].sum())
    else:
        full, starts, rests = _cut(offsets, lengths, context)
        dropped = 0
    order = np.argsort(-rests, kind="stable")
    lengths_left = rests[order].tolist()
    pieces = list(zip(starts[order].tolist(), lengths_left, strict=True))
    rows = [[pieces[number] for number in row] for row in _best_fit(lengths_left, context)]
    if not whole:
        rows = _fill_holes(rows, context)
    sizes = [1] * len(full) + [len(row) for row in rows]
    packed = np.array([piece for row in rows for piece in row], dtype=np.int64).reshape(-1, 2)
    return Packing(
        start=np.concatenate([full, packed[:, 0]]),
        length=np.concatenate([np.full(len(full), context, dtype=np.int64), packed[:, 1]]),
        first=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
        dropped=dropped,
    )


def _cut(offsets: np.ndarray, lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts of the pieces that fill a row, and starts and lengths of what is left of each document."""
    rows = lengths // context
    document = np.repeat(np.arange(len(lengths)), rows)
    number = np.arange(len(document)) - np.repeat(np.cumsum(rows) - rows, rows)
    rests = lengths - rows * context
    left = rests > 0
    return offsets[document] + number * context, (offsets + rows * context)[left], rests[left]


def _best_fit(lengths: list[int], context: int) -> list[list[int]]:
    """Which of the falling `lengths` go into each row: each into the fullest row that has room."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> rows that have exactly that much
    rooms: list[int] = []  # its keys, rising
    for piece, length in enumerate(lengths):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), context
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(piece)
        left = room - length
        if left and left not in with_room:
            insort(rooms, left)
        if left:
            with_room.setdefault(left, []).append(row)
    return rows


def _fill_holes(rows: list[list[Piece]], context: int) -> list[list[Piece]]:
    """As few rows as the positions need: the pieces of the emptiest rows fill the others, largest hole first."""
    used = [sum(length for _, length in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: -used[row])
    fewest = -(-sum(used) // context)
    loose = [piece for row in order[fewest:] for piece in reversed(rows[row])]
    for row in reversed(order[:fewest]):
        room = context - used[row]
        while room and loose:
            start, length = loose.pop()
            rows[row].append((start, min(length, room)))
            if length > room:
                loose.append((start + room, length - room))
            room -= min(length, room)
    return [rows[row] for row in order[:fewest]]
