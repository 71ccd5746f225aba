"""Guesses the next tokens of a reply from its own text: what followed when the last few tokens came before.

A guess costs little where a step's time goes into reading weights, and a wrong one changes no token: the engine keeps
only what it would have drawn. Whether guessing pays is measured for each sequence, from its own past alone.
Sources: prompt lookup decoding, Saxena 2023; LLMA, Yang et al. 2023; the length of a guess follows Leviathan et al.
2023, section 3.5, with the price of a guess in the place of the small model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIZES = (8, 5, 3, 2)  # of the n-grams that are looked up, the longest first
PRICE = 0.2  # of one more guessed token, in steps: about 0.05 where a sequence runs alone, 0.5 with seven others
FADE = 0.9  # weight of the past at each judgement: some ten of them count
TRIAL = 2  # tokens of the shortest guess
PAUSE = 16  # tokens without guesses after they did not pay; doubled each time in a row
LONGEST_PAUSE = 512


@dataclass(slots=True)
class _Record:
    """What the guesses from n-grams of one size were worth."""

    kept: float = 1.0  # guessed tokens that came true, and
    tried: float = 2.0  # those that were tested: fading counts, which begin at a rate of 1/2
    resume: int = 0  # length of the text at which guessing goes on
    pause: int = PAUSE

    def length(self, most: int) -> int:
        """Token i of a guess comes true with probability rate**i; as many tokens as are worth the price."""
        rate = self.kept / self.tried
        if rate >= 1:
            return most
        return min(most, max(TRIAL, int(math.log(PRICE) / math.log(rate)) if rate > 0 else 0))

    def add(self, tested: int, kept: int, text: int) -> None:
        """text: its length now."""
        self.kept = FADE * self.kept + kept
        self.tried = FADE * self.tried + tested
        if self.kept >= PRICE * self.tried:
            self.pause = PAUSE
        else:
            self.resume = text + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)


class Lookup:
    """The guesses for one sequence. most: tokens of a guess.

    Nothing is indexed before the first guess; after that a token costs the same however long the text is.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._text = list(tokens)
        self._most = most
        # Hash of an n-gram -> where the token after its last occurrence stands. Half the memory of keeping the n-grams;
        # should two of them ever share a hash, that is a poor guess and no more.
        self._after: dict[int, int] = {}
        self._indexed = 0  # tokens of the text that the index knows as a token after an n-gram
        self._records = {size: _Record() for size in SIZES}
        self._last = SIZES[0]  # size of the n-gram that the last guess came from

    def extend(self, tokens: Sequence[int]) -> None:
        """These tokens came next."""
        self._text.extend(tokens)

    def propose(self) -> list[int]:
        """The guess for the next tokens; often []."""
        text = len(self._text)
        if all(text < record.resume for record in self._records.values()):
            return []
        self._index()
        for size in SIZES:
            start = self._after.get(hash(tuple(self._text[-size:]))) if size < text else None
            if start is not None:
                record = self._records[size]
                self._last = size
                return self._copied(start, record.length(self._most)) if text >= record.resume else []
        return []

    def judged(self, drafted: int, accepted: int) -> None:
        """The first `drafted` tokens of the last guess were tested, and the first `accepted` of these came true."""
        assert 0 <= accepted <= drafted, f"{accepted} of {drafted} guessed tokens accepted"
        if drafted:  # behind the first wrong one nothing is tested
            self._records[self._last].add(min(accepted + 1, drafted), accepted, len(self._text))

    def _index(self) -> None:
        for place in range(self._indexed, len(self._text)):
            for size in SIZES:
                if place >= size:
                    self._after[hash(tuple(self._text[place - size : place]))] = place
        self._indexed = len(self._text)

    def _copied(self, start: int, length: int) -> list[int]:
        """The text from `start` on. It may run into the guess itself, as in LZ77: so a loop goes on."""
        guess = self._text[start : start + length]
        period = len(self._text) - start
        while len(guess) < length:
            guess.append(guess[-period])
        return guess
