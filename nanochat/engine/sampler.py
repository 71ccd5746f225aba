"""From logits to one token: temperature, top-k, top-p and a random number that anybody can draw again.

Works in float64 on fp32 logits, on the CPU, and needs numpy alone. The random number of a token is a function of
(seed, position in the sequence), so batching, pre-emption and a move to another machine cannot change a reply: a
reply goes on exactly where it broke off when the prompt with the tokens so far is asked again with the same seed.
Random numbers: Philox, Salmon et al. 2011.  Top-p: Holtzman et al. 2019.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How one reply is made. Raises ValueError that begins with the name of the field.

    top_k first, then top_p of what is left, both after the temperature (the order of transformers and vLLM).
    """

    max_tokens: int
    temperature: float = 1.0  # 0: the likeliest token, always
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # None: the engine draws one
    stop: tuple[int, ...] = ()  # tokens that end the reply; empty: the engine's own

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, None)
        _number("temperature", self.temperature, None)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1, None)
        if self.top_p is not None:
            _number("top_p", self.top_p, 1)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        for token in self.stop:
            _whole("stop", token, 0, None)


def choose(logits: npt.NDArray[np.float32], params: SampleParams, seed: int, position: int) -> tuple[int, float]:
    """The token at `position` of the sequence, and its log-probability under the model.

    logits: (V,).  The log-probability is the model's own, before temperature and filters.
    Raises FloatingPointError if a logit is NaN or infinite.
    """
    scores = logits.astype(np.float64)
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"logits at position {position} are not finite: the weights are broken")
    scores -= scores.max()
    if params.temperature == 0:
        token = int(scores.argmax())  # of equal ones the lowest id
    else:
        tokens, shares = support(scores, params)
        below = np.cumsum(shares)
        place = int(np.searchsorted(below, uniform(seed, position) * below[-1], side="right"))
        token = int(tokens[min(place, len(tokens) - 1)])  # u * total may round up to the total
    return token, float(scores[token] - math.log(np.exp(scores).sum()))


def support(scores: Floats, params: SampleParams) -> tuple[npt.NDArray[np.int64], Floats]:
    """The tokens that may be drawn, by id, and their weights, which need not sum to 1.

    scores: (V,) logits.  Equal scores rank by id, so ties at the border are settled the same way every time; drawn by
    id and not by rank, a filter that rules nothing out changes nothing.
    """
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature makes -inf, which weighs 0 as it should
        shares = np.exp((scores - scores.max()) / params.temperature)
    tokens = np.arange(len(scores))
    if params.top_k is None and params.top_p is None:
        return tokens, shares
    tokens = np.argsort(-scores, kind="stable")[: params.top_k]
    if params.top_p is not None:
        below = np.cumsum(shares[tokens])
        tokens = tokens[: 1 + int(np.searchsorted(below, params.top_p * below[-1], side="left"))]
    tokens = np.sort(tokens)
    return tokens, shares[tokens]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to (seed, position)."""
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def _whole(name: str, value: object, least: int, most: int | None) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not good:
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {limits}")


def _number(name: str, value: object, most: float | None) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf  # NaN: no
    if not good or (most is not None and value > most):  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it must be a number, {'0 or more' if most is None else f'0 to {most}'}")
