"""What a load asks for: requests with their lengths and times, and the tokens or words of their prompts.

The same numbers give the same requests, so two sides that are compared are asked the same.
"""

from dataclasses import dataclass, replace

import numpy as np

# Word-like: two or three syllables. How many tokens a word has depends on the vocabulary; target.py asks.
SYLLABLES = ["ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve", "wi", "ka", "lo"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. Lengths are in tokens."""

    prompt: int
    new: int
    at_s: float = 0.0  # of an open loop: seconds after its beginning
    blocks: tuple[int, ...] = ()  # names of the prompt's parts; equal names in front are an equal beginning
    block: int = 0  # tokens of each part


@dataclass(frozen=True, kw_only=True)
class Load:
    """Many requests, and when they are sent.

    A closed loop has `clients` and asks `asked` again and again, for `seconds` or `requests`. An open loop has none,
    and sends each of `asked` at its time, whatever became of the others.
    """

    asked: tuple[Asked, ...]
    clients: int | None = None
    seconds: float | None = None
    requests: int | None = None
    shared: int = 0  # first tokens that all prompts have in common
    seed: int = 0

    def nth(self, number: int) -> Asked:
        """The request of this number.

        Each client of a closed loop begins with another part of a reply: else all replies would end at once, again
        and again.
        """
        one = self.asked[number % len(self.asked)]
        if self.clients and number < self.clients:
            return replace(one, new=max(1, one.new * (number + 1) // self.clients))
        return one

    def more(self, number: int, at_s: float) -> bool:
        """Whether a client of a closed loop asks for this number at that time."""
        return (self.seconds is None or at_s < self.seconds) and (self.requests is None or number < self.requests)


def prompt_tokens(load: Load, number: int, vocabulary: int) -> list[int]:
    """Random ids below `vocabulary`."""
    one = load.nth(number)
    parts = [_ids((0, 0), min(load.shared, one.prompt), vocabulary)]
    for name in one.blocks:
        parts.append(_ids((1, name), one.block, vocabulary))
    parts.append(_ids((2, load.seed, number), one.prompt, vocabulary))
    return [token for part in parts for token in part][: one.prompt]


def prompt_words(load: Load, number: int, words: int) -> str:
    """So many random words; of them the first `load.shared` are always the same."""
    ids = prompt_tokens(replace(load, asked=(Asked(words, 1),), clients=None), number, len(SYLLABLES) ** 3)
    each = len(SYLLABLES)
    return " ".join(SYLLABLES[i % each] + SYLLABLES[i // each % each] + SYLLABLES[i // each**2] for i in ids)


def poisson(asked: tuple[Asked, ...], rate: float, seed: int) -> tuple[Asked, ...]:
    """The same requests at random times, `rate` a second in the mean."""
    waits = np.random.default_rng((3, seed)).exponential(1 / rate, size=len(asked))
    return tuple(replace(one, at_s=float(at)) for one, at in zip(asked, np.cumsum(waits), strict=True))


def _ids(seed: tuple[int, ...], count: int, vocabulary: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(vocabulary, size=count).tolist()
    return ids
