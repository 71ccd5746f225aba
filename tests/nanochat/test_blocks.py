"""The block pool against what it stands for: texts, and the longest beginning that two of them share."""

import random

import numpy as np
import pytest

from nanochat.engine.blocks import BlockPool, common_tokens
from nanochat.engine.runner import BLOCK
from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Sequence


def sequence(tokens: list[int], room: int = 64) -> Sequence:
    ids = np.zeros(len(tokens) + room, np.int32)
    ids[: len(tokens)] = tokens
    row = np.zeros(len(ids) // BLOCK + 1, np.int32)
    params = SampleParams(max_tokens=room)
    return Sequence(
        id=0, index=0, order=0, params=params, seed=0, stop=frozenset(), ids=ids, prompt=len(tokens), arrived=0.0,
        known=len(tokens), row=row,
    )  # fmt: skip


def start(pool: BlockPool, tokens: list[int]) -> tuple[Sequence, tuple[int, int] | None]:
    """A sequence with all that the pool has of its tokens, and the copy that it needs."""
    new = sequence(tokens)
    pool.match(new)
    return new, pool.match_part(new)


def compute(pool: BlockPool, one: Sequence, tokens: int | None = None) -> Sequence:
    """As many of its tokens as are known, or fewer."""
    count = one.known - one.computed if tokens is None else tokens
    assert pool.grow(one, count) == count
    one.computed += count
    pool.note(one)
    return one


def run(pool: BlockPool, tokens: list[int]) -> int:
    """From prompt to end; how many of its tokens came from the cache."""
    one, _ = start(pool, tokens)
    found = one.computed
    pool.release(compute(pool, one))
    pool.check([])
    return found


def numbers(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_a_common_beginning_lies_in_the_cache_once() -> None:
    pool = BlockPool(10)
    first = compute(pool, start(pool, numbers(0, 40))[0])
    second, copy = start(pool, [*numbers(0, 32), 99])
    assert (second.computed, copy) == (32, None)
    assert second.blocks == first.blocks[:2]
    compute(pool, second)
    pool.check([first, second])
    assert pool.free == 10 - 4
    pool.release(first)
    pool.release(second)
    pool.check([])
    assert pool.free == 10


def test_the_same_tokens_after_others_are_another_block() -> None:
    pool = BlockPool(10)
    run(pool, numbers(0, 16) + numbers(50, 17))
    assert run(pool, numbers(50, 17)) == 0
    assert run(pool, numbers(1, 16) + numbers(50, 17)) == 0


def test_the_last_token_is_computed_always_and_never_in_a_shared_block() -> None:
    pool = BlockPool(10)
    first = compute(pool, start(pool, numbers(0, 32))[0])
    second, copy = start(pool, numbers(0, 32))
    assert second.computed == 31
    assert copy == (first.blocks[1], second.blocks[1])
    compute(pool, second)  # and the two blocks hold the same again
    assert second.blocks == first.blocks
    assert second.row is not None
    assert second.row.tolist()[:2] == first.blocks
    pool.check([first, second])
    assert pool.free == 10 - 2


def test_a_chats_next_turn_goes_on_in_the_block_of_the_last() -> None:
    pool = BlockPool(10)
    text = numbers(0, 20)
    for turn in range(10):
        one, copy = start(pool, text)
        assert copy is None, "a block that nobody uses needs no copy"
        assert one.computed == (20 + 7 * (turn - 1) if turn else 0)
        pool.release(compute(pool, one))
        text += numbers(100 * turn + 100, 7)
        assert 10 - pool.free == 0


def test_what_a_running_sequence_has_computed_is_copied_but_not_what_it_only_knows() -> None:
    pool = BlockPool(10)
    first = compute(pool, start(pool, numbers(0, 30))[0], 21)
    second, copy = start(pool, numbers(0, 30))
    assert second.computed == 21
    assert copy == (first.blocks[1], second.blocks[1])
    pool.check([first, second])


def test_rejected_drafts_are_no_content() -> None:
    pool = BlockPool(10)
    first = compute(pool, start(pool, numbers(0, 18))[0])
    first.ids[18:24] = numbers(18, 6)  # a draft, its keys written, of which one token is right
    pool.grow(first, 6)
    first.known, first.computed = 20, 19
    pool.note(first)
    pool.release(first)
    assert run(pool, numbers(0, 30)) == 19


@pytest.mark.parametrize("seed", range(10))
def test_as_much_is_found_as_any_earlier_text_begins_alike(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(4000)
    known: list[list[int]] = []  # everything computed so far
    running: list[Sequence] = []
    for _ in range(60):
        text = [draw.randrange(2) for _ in range(draw.randint(1, 80))]
        if known and draw.random() < 0.8:
            text = draw.choice(known)[: draw.randint(1, 80)] + text
        one, _ = start(pool, text)
        best = max((common(other, text[:-1]) for other in known), default=0)
        assert one.computed == best
        compute(pool, one, draw.randint(1, one.known - one.computed))
        known.append(text[: one.computed])
        running.append(one)
        if draw.random() < 0.7:
            pool.release(running.pop(draw.randrange(len(running))))
        pool.check(running)


def common(a: list[int], b: list[int]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


def test_the_block_that_was_needed_last_stays_longest_and_parents_outlive_children() -> None:
    pool = BlockPool(6)
    run(pool, numbers(0, 48))
    run(pool, numbers(100, 48))
    pool.release(start(pool, numbers(0, 33))[0])  # the first two blocks of the first text are needed again
    run(pool, numbers(200, 48))  # takes 3 of 6 blocks
    found = {text: start(pool, numbers(text, 49))[0].computed for text in (0, 100)}
    assert found == {0: 32, 100: 16}


def test_blank_blocks_go_first() -> None:
    pool = BlockPool(8)
    run(pool, numbers(0, 64))
    run(pool, numbers(100, 64))  # the other 4
    assert run(pool, numbers(0, 65)) == 64


def test_spoilt_blocks_are_never_found() -> None:
    pool = BlockPool(8)
    first = compute(pool, start(pool, numbers(0, 40))[0])
    pool.release(first, spoilt=True)
    pool.check([])
    assert run(pool, numbers(0, 40)) == 0


def test_a_spoilt_block_that_others_use_stays_theirs() -> None:
    pool = BlockPool(8)
    first = compute(pool, start(pool, numbers(0, 40))[0])
    second = compute(pool, start(pool, numbers(0, 33))[0])
    pool.release(first, spoilt=True)
    pool.check([second])
    assert len(second.blocks) == 3
    pool.release(second)
    pool.check([])
    assert pool.free == 8


def test_a_full_pool_gives_what_it_has() -> None:
    pool = BlockPool(2)
    one = sequence(numbers(0, 60))
    assert not pool.fits(one)
    assert pool.grow(one, 60) == 32
    other = sequence(numbers(0, 5))
    assert pool.grow(other, 5) == 0
    assert not pool.fits(other)
    pool.release(one)
    assert pool.fits(other)


def test_what_is_shared_counts_for_what_fits() -> None:
    pool = BlockPool(3)
    first = compute(pool, start(pool, numbers(0, 33))[0])
    assert not pool.fits(sequence(numbers(0, 33)))
    pool.release(first)
    held = compute(pool, start(pool, numbers(0, 16))[0])  # 15 tokens copied and one computed: the same block again
    assert held.blocks != []
    assert pool.fits(sequence(numbers(0, 33)))
    assert not pool.fits(sequence(numbers(100, 33)))


def test_common_tokens() -> None:
    def piece(*tokens: int) -> bytes:
        return np.array(tokens, np.int32).tobytes()

    assert common_tokens(piece(1, 2, 3), piece(1, 2, 4)) == 2
    assert common_tokens(piece(1, 2), piece(1, 2, 4)) == 2
    assert common_tokens(piece(256), piece(512)) == 0  # bytes alike, tokens not
    assert common_tokens(b"", piece(1)) == 0
