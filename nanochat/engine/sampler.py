"""From logits to tokens: penalty, temperature, filters, and a random number that anybody can draw again.

Decides in float64 on fp32 logits. The random number of a token is a function of (seed, position in the sequence), so
batching, pre-emption, speculation and a move to another machine cannot change a reply: a reply goes on exactly where
it broke off when the prompt with the tokens so far is asked again with the same seed.
On a CPU it needs numpy alone and one thread: torch's worker threads would spin on the cores of the native kernel.
Random numbers: Philox, Salmon et al. 2011.  Top-p: Holtzman et al. 2019.  Min-p: Nguyen et al. 2024.  Repetition
penalty: Keskar et al. 2019.
"""

# R rows, V vocabulary

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # whoever only needs SampleParams, as the gateway, does not wait for torch
    from torch import Tensor

Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32] | Floats  # (V,) logits of a row, fp64 where a penalty has changed them
Tokens = npt.NDArray[np.int64]

MOST = 2**31 - 1  # of counts and ids
MOST_REPLIES = 16
MOST_LOGPROBS = 20
HEAD = 128  # tokens among which the end of a top-p is looked for first
BUCKETS = 1024  # of scores, when it is not among those
SPAN = 128  # weights that are summed up at a time when one is drawn


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How one reply is made. Raises ValueError that begins with the name of the field.

    Repetition penalty, temperature, top_k, top_p of what is left, min_p: the order of transformers.
    """

    max_tokens: int
    temperature: float = 1.0  # 0: the likeliest token, always
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None  # times the likeliest token's probability: the least that a token needs
    repetition_penalty: float = 1.0  # divides positive logits of tokens that were there, multiplies negative ones
    seed: int | None = None  # None: the engine draws one
    stop: tuple[int, ...] = ()  # tokens that end the reply; empty: the engine's own
    n: int = 1  # replies; reply number i draws with seed + i
    logprobs: int | None = None  # None: none; else the drawn token's and those of that many of the likeliest tokens
    timeout_s: float | None = None  # from the request's arrival; the reply ends then

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, MOST)
        _number("temperature", self.temperature, 0, None)
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)  # beyond, float64 could overflow
        _whole("n", self.n, 1, MOST_REPLIES)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1, MOST)
        if self.top_p is not None:
            _number("top_p", self.top_p, 0, 1)
        if self.min_p is not None:
            _number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.timeout_s is not None:
            _number("timeout_s", self.timeout_s, 0, None)
            if self.timeout_s == 0:
                raise ValueError("timeout_s is 0; it must be a number above 0, or None for no limit")
        if not isinstance(self.stop, tuple):
            raise ValueError(f"stop is {self.stop!r:.80}; it must be a tuple of token ids")
        for token in self.stop:
            _whole("stop", token, 0, MOST)


@dataclass(slots=True)
class Draw:
    """What the token of one row of logits depends on besides them."""

    params: SampleParams
    seed: int  # of this reply: the request's seed + its index
    position: int  # of the token to be drawn, in prompt and reply
    seen: Sequence[int]  # prompt and reply so far; read only for a repetition penalty (an array saves a copy)


@dataclass(slots=True)
class Drawn:
    """One token. Log-probabilities are the model's own: before penalty, temperature and filters."""

    token: int
    logprob: float | None  # None where none was asked for
    top: dict[int, float]  # the likeliest tokens and theirs, the likeliest first


def sample(logits: "Tensor", draws: Sequence[Draw]) -> list[Drawn | None]:
    """The token of each row, None where a row holds NaN or infinity. No row depends on another.

    logits: (R, V) fp32, one row for each of `draws`; they are neither kept nor changed.
    """
    assert len(logits) == len(draws), f"{len(logits)} rows of logits for {len(draws)} draws"
    if not draws:
        return []
    if logits.device.type != "cpu":
        from nanochat.engine.device_sampler import sample_on_device  # needs torch

        return sample_on_device(logits, draws)
    rows: npt.NDArray[np.float32] = logits.detach().numpy()
    best = rows.argmax(axis=1)  # of equal ones the lowest id; a NaN counts as the largest
    sound = np.isfinite(rows[np.arange(len(rows)), best]) & (rows.min(axis=1) > -np.inf)
    choose = _Chooser(rows.shape[1]) if any(draw.params.temperature > 0 for draw in draws) else None
    return [
        _drawn(row, token, draw, choose) if good else None
        for row, token, good, draw in zip(rows, best.tolist(), sound.tolist(), draws, strict=True)
    ]


class Uniform:
    """Random numbers in [0, 1), each a function of (seed, position) alone.

    One of numpy's generators, set anew for every number: 1.3 us, where making one takes 9.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state = self._philox.state

    def __call__(self, seed: int, position: int) -> float:
        """seed: below 2**128.  position: below 2**64."""
        self._state["state"]["key"][:] = seed & (2**64 - 1), seed >> 64
        self._state["state"]["counter"][0] = position
        self._philox.state = self._state
        return (int(self._philox.random_raw()) >> 11) * 2.0**-53


def _drawn(row: npt.NDArray[np.float32], best: int, draw: Draw, choose: "_Chooser | None") -> Drawn:
    """best: the likeliest token of the row, before the penalty.  choose: None where all rows are greedy."""
    params = draw.params
    scores: Scores = row if params.repetition_penalty == 1 else _penalised(row, draw)
    if params.temperature > 0 and choose:
        token = choose(scores, draw)
    else:
        token = best if scores is row else int(scores.argmax())
    if params.logprobs is None:
        return Drawn(token, None, {})
    top = float(row[best])
    total = top + math.log(_weigh(row.astype(np.float64), top, 1.0).sum())
    likeliest = _best(row, params.logprobs).tolist() if params.logprobs else []
    return Drawn(token, float(row[token]) - total, {id: float(row[id]) - total for id in likeliest})


def _penalised(row: npt.NDArray[np.float32], draw: Draw) -> Floats:
    scores = row.astype(np.float64)
    seen = np.asarray(draw.seen, dtype=np.int64)
    old, penalty = scores[seen], draw.params.repetition_penalty
    scores[seen] = np.where(old < 0, old * penalty, old / penalty)  # a token seen twice gets the same value twice
    return scores


class _Chooser:
    """Draws from rows of V scores, one after the other.

    Its memory is for a whole row each; made anew for every row, it would cost as much in page faults as the work does.
    """

    def __init__(self, size: int) -> None:
        self._number = Uniform()
        self._weights = np.empty(size)
        self._depth = np.empty(size, np.float32)
        self._bucket = np.empty(size, np.int64)
        self._mask = np.empty(size, np.bool_)

    def __call__(self, scores: Scores, draw: Draw) -> int:
        """The token that belongs to the random number; drawn by id, so filters that rule nothing out change nothing."""
        params, top = draw.params, float(scores.max())
        if params.top_k is not None and params.top_k < len(scores):
            tokens, weights = _best_of(scores, top, params)
        else:
            tokens, weights = None, self._weights
            np.copyto(weights, scores)
            _weigh(weights, top, params.temperature)
            if params.top_p is not None and params.top_p < 1:
                tokens, weights = self._nucleus(scores, params)
        if params.min_p is not None:
            weights *= weights >= params.min_p
        place = _place(weights, self._number(draw.seed, draw.position))
        return place if tokens is None else int(tokens[place])

    def _nucleus(self, scores: Scores, params: SampleParams) -> tuple[Tokens | None, Floats]:
        """The fewest likeliest tokens that have the share top_p of the weight, by id, and their weights.

        No tokens: all of them, and the weights of those that are not in it are 0.
        """
        assert params.top_p is not None, "a nucleus has a share"
        weights = self._weights
        goal = params.top_p * float(weights.sum())
        if goal <= HEAD:  # no token weighs more than 1
            head = _best(scores, HEAD)
            below = np.cumsum(weights[head])
            if below[-1] >= goal:
                tokens = np.sort(head[: _reach(below, goal)])
                return tokens, weights[tokens]
        # The last one lies far down: find the bucket of scores that holds it, and rank the tokens of that one alone.
        bucket = self._buckets(scores, params.temperature)
        below = np.cumsum(np.bincount(bucket, weights))
        edge = _reach(below, goal) - 1
        tokens = np.flatnonzero(np.equal(bucket, edge, out=self._mask))
        tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
        last = _reach(np.cumsum(weights[tokens]), goal - (below[edge - 1] if edge else 0.0))
        weights *= np.less_equal(bucket, edge, out=self._mask)
        weights[tokens[last:]] = 0
        return None, weights

    def _buckets(self, scores: Scores, temperature: float) -> Tokens:
        """A number for each token that never falls as its score falls."""
        depth = self._depth
        with np.errstate(over="ignore"):
            np.subtract(scores.max(), scores, out=depth, casting="same_kind")
            span = min(40 * temperature, float(depth.max()))  # what lies deeper weighs less than e**-40
            depth *= BUCKETS / max(span, 1e-30)
        np.copyto(self._bucket, np.minimum(depth, BUCKETS, out=depth), casting="unsafe")
        return self._bucket


def _best_of(scores: Scores, top: float, params: SampleParams) -> tuple[Tokens, Floats]:
    """The top_k likeliest tokens, of them those in top_p, by id, and their weights."""
    assert params.top_k is not None, "top_k is set"
    tokens = _best(scores, params.top_k)
    if params.top_p is not None and params.top_p < 1:
        below = np.cumsum(_weigh(scores[tokens].astype(np.float64), top, params.temperature))
        tokens = tokens[: _reach(below, params.top_p * below[-1])]
    tokens = np.sort(tokens)
    return tokens, _weigh(scores[tokens].astype(np.float64), top, params.temperature)


def _weigh(scores: Floats, top: float, temperature: float) -> Floats:
    """The scores become weights, in place: 1 for one of `top`."""
    scores -= top
    if temperature != 1:
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf, which weighs 0 as it should
            scores /= temperature
    return np.exp(scores, out=scores)


def _best(scores: Scores, count: int) -> Tokens:
    """The `count` likeliest tokens, the likeliest first; equal ones rank by id.

    The count-th largest of the maxima of groups of tokens is at most the count-th largest score, so tokens below it
    need not be looked at. 50 of 32,768: 30 us; numpy's argpartition alone takes 300 us.
    """
    count = min(count, len(scores))
    groups = max(1024, 1 << (2 * count - 1).bit_length())
    width = len(scores) // groups
    peaks = scores[: width * groups].reshape(width, groups).max(axis=0) if width > 1 else scores
    least = np.partition(peaks, len(peaks) - count)[len(peaks) - count]
    tokens = np.flatnonzero(scores >= least)
    return tokens[np.argsort(-scores[tokens], kind="stable")[:count]]


def _reach(below: Floats, goal: float) -> int:
    """How many of the numbers whose running sums are `below` it takes to reach the goal, or else their total."""
    return 1 + int(np.searchsorted(below, min(goal, below[-1])))


def _place(weights: Floats, number: float) -> int:
    """Where number * total lies in the running sum of the weights; never at a weight of 0."""
    if len(weights) <= 4 * SPAN:
        below = np.cumsum(weights)
        return _above(below, number * below[-1])
    # A running sum of everything takes three times as long as these two.
    below = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), SPAN)))
    goal = number * below[-1]
    span = _above(below, goal)
    if span:
        goal -= below[span - 1]
    return span * SPAN + _above(np.cumsum(weights[span * SPAN : (span + 1) * SPAN]), goal)


def _above(below: Floats, goal: float) -> int:
    """The first running sum above the goal; where rounding has put the goal too high, the first that is the total."""
    return int(min(np.searchsorted(below, goal, side="right"), np.searchsorted(below, below[-1])))


def _whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}; it must be a whole number, {least} to {most}")


def _number(name: str, value: object, least: float, most: float | None) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= (1e308 if most is None else most):  # type: ignore[operator]  # NaN: neither
        limits = f"{least:g} or more" if most is None else f"{least:g} to {most:g}"
        raise ValueError(f"{name} is {_shown(value)}; it must be a number, {limits}")


def _shown(value: object) -> str:
    """Short: Python refuses to print a whole number of 5,000 digits."""
    return f"{value!r:.80}" if not isinstance(value, int) or value.bit_length() < 256 else "a number of over 77 digits"
