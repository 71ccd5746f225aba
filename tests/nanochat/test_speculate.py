"""Guesses against a search through the whole text, and the switch on texts where guessing pays or does not."""

import argparse
import inspect
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine.speculate import LONGEST_PAUSE, PAUSE, SIZES, Lookup

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def searched(text: list[int]) -> int | None:
    """Where the guess begins: behind the last earlier place of the longest of the n-grams that the text ends with."""
    for size in SIZES:
        for start in range(len(text) - 1, size - 1, -1):
            if text[start - size : start] == text[-size:]:
                return start
    return None


def follow(text: list[int], most: int, known: int) -> tuple[int, int]:
    """Steps that it takes to write text[known:] with guesses, and the guessed tokens tested for it."""
    lookup, steps, drafted = Lookup(text[:known], most), 0, 0
    while known < len(text):
        guess = lookup.propose()
        right = 0
        while right < len(guess) and known + right < len(text) - 1 and guess[right] == text[known + right]:
            right += 1
        lookup.judged(len(guess), right)
        lookup.extend(text[known : known + right + 1])
        known += right + 1
        steps += 1
        drafted += len(guess)
    return steps, drafted


@given(TEXTS, st.integers(1, 12), st.lists(st.integers(0, 60)))
def test_a_guess_continues_the_last_occurrence(text: list[int], most: int, borders: list[int]) -> None:
    """However the text came: as a prompt or in pieces, with and without guesses between."""
    cuts = [0, *sorted(border % (len(text) + 1) for border in borders), len(text)]
    lookup = Lookup(text[: cuts[1]], most)
    for start, end in itertools.pairwise(cuts[1:]):
        if start % 2:
            lookup.propose()
        lookup.extend(text[start:end])
    guess, found = lookup.propose(), searched(text)
    if found is None:
        assert guess == []
        return
    assert 1 <= len(guess) <= most
    longer = list(text)
    for place, token in enumerate(guess, found):
        assert token == longer[place]
        longer.append(token)


def test_a_loop_is_guessed_beyond_its_end() -> None:
    lookup = Lookup([9, 1, 2, 3, 1, 2, 3, 1, 2], 8)
    for _ in range(30):  # success makes guesses longer
        lookup.judged(len(lookup.propose()), len(lookup.propose()))
    assert lookup.propose() == [3, 1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("most", [1, 4, 16])
def test_a_copy_takes_one_step_for_a_whole_guess(most: int) -> None:
    dice = random.Random(0)
    passage = [dice.randrange(10_000) for _ in range(400)]
    steps, _ = follow(passage + passage, most, 410)  # ten tokens of the copy are there
    assert steps <= 390 / (most + 1) + 8  # a few short guesses to begin with


def test_where_guesses_fail_they_become_rare() -> None:
    dice = random.Random(1)
    text = [dice.randrange(20) for _ in range(6_000)]  # nearly every pair was there before
    steps, drafted = follow(text, 8, 100)
    assert steps > 0.98 * 5_900
    assert drafted < 0.03 * 5_900


def test_guessing_begins_again_where_the_text_repeats_itself() -> None:
    dice = random.Random(2)
    noise = [dice.randrange(20) for _ in range(3_000)]
    passage = [dice.randrange(20, 10_000) for _ in range(200)]
    calm, _ = follow(noise, 8, 100)
    steps, _ = follow(noise + passage * 12, 8, 100)
    written = 200 * 12
    pause = LONGEST_PAUSE + 200  # at worst one begins just before the text repeats itself
    assert steps - calm < pause + (written - pause) / 4


def test_guesses_from_short_ngrams_may_pause_while_those_from_long_ones_go_on() -> None:
    """A text in which pairs mislead and long passages do not."""
    dice = random.Random(3)
    passage = [dice.randrange(12) for _ in range(600)]
    steps, _ = follow(passage * 3, 8, 700)
    assert steps < 1_100 / 6


def test_a_sequence_judges_by_its_own_past_alone() -> None:
    dice = random.Random(4)
    texts = [[dice.randrange(8) for _ in range(500)] for _ in range(2)]
    alone = [follow(text, 6, 20) for text in texts]
    assert [follow(text, 6, 20) for text in reversed(texts)] == alone[::-1]


def test_pauses_grow_until_a_guess_comes_true() -> None:
    lookup = Lookup([1, 2, 3, 1, 2], 4)
    fresh = 10
    for pause in (PAUSE, 2 * PAUSE, PAUSE):
        while lookup.propose():
            lookup.judged(2, 0)
        waited = 0
        while not lookup.propose():
            assert waited < pause
            lookup.extend([fresh, 1, 2])  # the pair comes again, nothing longer does
            waited, fresh = waited + 3, fresh + 1
        assert waited >= pause
        if pause > PAUSE:
            lookup.judged(2, 2)


def test_what_follows_a_wrong_token_counts_for_nothing() -> None:
    """Four tokens right and the fifth wrong is a rate of 4/5, whatever length the guess had."""
    lookup = Lookup([1, 2, 3, 1, 2], 16)
    for _ in range(60):
        assert lookup.propose()
        lookup.judged(16, 4)
    assert len(lookup.propose()) == 7  # 0.8**7 is above the price of 0.2, 0.8**8 is not


def test_code_is_written_in_fewer_steps() -> None:
    """Real text: a module of Python's library, by bytes; the second half follows the first."""
    text = list(inspect.getsource(argparse).encode()[:24_000])
    steps, drafted = follow(text, 8, 12_000)
    assert 12_000 / steps > 1.8
    assert (12_000 - steps) / drafted > 0.3


def test_an_empty_text_and_no_judgement() -> None:
    lookup = Lookup([], 4)
    assert lookup.propose() == []
    lookup.judged(0, 0)
    lookup.extend([5])
    assert lookup.propose() == []


def test_more_right_than_guessed_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="3 of 2"):
        Lookup([1], 4).judged(2, 3)
