"""Packing: what must hold for any documents, found by hypothesis."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.packing import Packing, pack

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


def rows_of(packing: Packing) -> list[list[tuple[int, int]]]:
    """Rows as lists of (start, length)."""
    pieces = list(zip(packing.start.tolist(), packing.length.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(packing.first[:-1], packing.first[1:], strict=True)]


@given(LENGTHS, st.integers(1, 30))
def test_text_covers_every_position_once_in_as_few_rows_as_there_can_be(lengths: list[int], context: int) -> None:
    packing = pack(np.array(lengths, dtype=np.int64), context, whole=False)
    rows = rows_of(packing)
    covered = sorted(at for row in rows for start, length in row for at in range(start, start + length))
    assert covered == list(range(sum(lengths)))
    assert all(0 < sum(length for _, length in row) <= context for row in rows)
    assert packing.rows == -(-sum(lengths) // context)
    assert packing.dropped == 0


@given(LENGTHS, st.integers(1, 30))
def test_no_piece_of_text_crosses_documents(lengths: list[int], context: int) -> None:
    packing = pack(np.array(lengths, dtype=np.int64), context, whole=False)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for start, length in zip(packing.start.tolist(), packing.length.tolist(), strict=True):
        assert len(set(document[start : start + length].tolist())) == 1


@given(LENGTHS, st.integers(1, 30))
def test_chats_are_whole_or_dropped(lengths: list[int], context: int) -> None:
    packing = pack(np.array(lengths, dtype=np.int64), context, whole=True)
    starts = np.cumsum(lengths) - lengths if lengths else []
    whole = {(int(s), n) for s, n in zip(starts, lengths, strict=True) if n <= context}
    rows = rows_of(packing)
    pieces = [piece for row in rows for piece in row]
    assert set(pieces) == whole
    assert len(pieces) == len(whole)
    assert all(0 < sum(length for _, length in row) <= context for row in rows)
    assert packing.dropped == sum(n for n in lengths if n > context)


def slow_best_fit(lengths: list[int], context: int) -> list[list[int]]:
    """Best-fit decreasing by its definition: look at every row for every document."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        rooms = [(context - sum(row), number) for number, row in enumerate(rows) if context - sum(row) >= length]
        if rooms:
            rows[min(rooms)[1]].append(length)
        else:
            rows.append([length])
    return rows


@given(LENGTHS, st.integers(60, 100))
def test_chats_are_packed_best_fit(lengths: list[int], context: int) -> None:
    rows = rows_of(pack(np.array(lengths, dtype=np.int64), context, whole=True))
    ours = sorted(sorted(length for _, length in row) for row in rows)
    assert sum(map(sum, ours)) == sum(lengths)
    assert len(ours) == len(slow_best_fit(lengths, context))


@given(LENGTHS, st.integers(1, 30), st.booleans())
def test_the_same_again(lengths: list[int], context: int, whole: bool) -> None:
    one, two = (pack(np.array(lengths, dtype=np.int64), context, whole=whole) for _ in range(2))
    assert rows_of(one) == rows_of(two)


@pytest.mark.parametrize("seed", range(3))
def test_few_documents_are_cut_that_need_not_be(seed: int) -> None:
    """Cutting fills the last holes only: a fifth at most of what is cut where documents are laid end to end."""
    lengths = np.random.default_rng(seed).integers(1, 500, 2000)
    packing = pack(lengths, 512, whole=False)
    assert len(packing.start) - len(lengths) < (packing.rows - 1) / 5
