"""How much each key may ask: a bucket of requests and one of tokens, which fill at the limit a minute.

A request takes its prompt and the longest reply it asks for, and gets back what was not drawn. Each process counts
for itself: behind several gateways a key has its limits at each of them. Knows no HTTP.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from math import inf

from pipelines.service.keys import Key
from pipelines.service.protocol import ApiError
from pipelines.service.replies import Delta

MINUTE_S = 60.0
ROUNDING = 1e-6  # whoever waits as long as was said finds what was said


class Bucket:
    """Holds a minute's worth, so in t seconds at most per_minute * (1 + t / 60) can be taken out of it.

    per_minute None: as much as anybody takes.  clock: seconds that never go back.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float]) -> None:
        self.size = inf if per_minute is None else float(per_minute)
        self._clock, self._left, self._at = clock, self.size, clock()

    @property
    def left(self) -> float:
        if self.size < inf:
            now = self._clock()
            self._left = min(self.size, self._left + (now - self._at) * self.size / MINUTE_S)
            self._at = now
        return self._left

    def wait_s(self, amount: float) -> float:
        """Seconds until so much is in it; 0 if it is."""
        left = self.left
        return 0.0 if amount <= left + ROUNDING else (amount - left) * MINUTE_S / self.size

    def take(self, amount: float) -> None:
        """Negative: gives back."""
        self._left = min(self.size, self.left - amount)


class Rates:
    """The buckets of all keys that have asked."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[Key, tuple[Bucket, Bucket]] = {}

    def begin(self, key: Key, tokens: int) -> None:
        """Takes one request with so many tokens. Raises ApiError 429, or 400 if it can never be."""
        requests, budget = self._of(key)
        if tokens > budget.size:
            said = (
                f"prompt and max_tokens are {tokens} tokens together; the key {key.name!r} has {key.tokens_per_minute} "
                f"a minute: shorten the prompt or set max_tokens lower"
            )
            raise ApiError(400, said, param="max_tokens", code="tokens_over_limit")
        for wait_s, limit, unit in (
            (requests.wait_s(1), key.requests_per_minute, "requests"),
            (budget.wait_s(tokens), key.tokens_per_minute, "tokens"),
        ):
            if wait_s:
                said = f"the key {key.name!r} has {limit} {unit} a minute; ask again in {wait_s:.1f} s"
                raise ApiError(429, said, code="rate_limit_exceeded", retry_after_s=wait_s)
        requests.take(1)
        budget.take(tokens)

    def give_back(self, key: Key, requests: int, tokens: int) -> None:
        """What was taken and not used."""
        for bucket, amount in zip(self._of(key), (requests, tokens), strict=True):
            bucket.take(-amount)

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's x-ratelimit headers."""
        found = {}
        for bucket, unit in zip(self._of(key), ("requests", "tokens"), strict=True):
            if bucket.size < inf:
                found[f"x-ratelimit-limit-{unit}"] = str(int(bucket.size))
                found[f"x-ratelimit-remaining-{unit}"] = str(int(bucket.left))
                found[f"x-ratelimit-reset-{unit}"] = f"{bucket.wait_s(bucket.size):.3f}s"
        return found

    async def metered(
        self, key: Key, prompt_tokens: int, asked: int, deltas: AsyncGenerator[Delta, None]
    ) -> AsyncGenerator[Delta, None]:
        """The pieces of a request as they come. Takes what it asks when the first is asked for."""
        self.begin(key, prompt_tokens + asked)
        drawn = 0
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    drawn += delta.tokens
                    yield delta
        except ApiError as error:
            if error.status == 429 and not drawn:  # turned away: it has cost nothing
                self.give_back(key, 1, prompt_tokens)
            raise
        finally:
            self.give_back(key, 0, asked - drawn)

    def _of(self, key: Key) -> tuple[Bucket, Bucket]:
        found = self._buckets.get(key)
        if found is None:
            found = Bucket(key.requests_per_minute, self._clock), Bucket(key.tokens_per_minute, self._clock)
            self._buckets[key] = found
        return found
