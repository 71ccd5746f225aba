"""A reply whose replica dies is continued by another, token for token.

The random number of a token belongs to (seed, position), so the prompt with all that was said, asked again with the
same seed, goes on exactly where the reply broke off.
"""

import logging
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from hashlib import sha256

from nanochat.engine.sampler import SampleParams
from nanochat.engine.sequence import Output
from nanochat.engine.stats import Stats
from pipelines.service.protocol import ApiError, Backend, ReplicaLostError

MOST_LOSSES = 2  # replicas that one request may cost: it may be the request that kills them
REFUSED_S = 600  # for so long a prompt that has cost so many is not tried again: others could have killed them
REMEMBERED = 1_024  # such prompts

logger = logging.getLogger(__name__)


class Continued:
    """A Backend over one whose replicas may die. Several replies of one request (n) are only begun again."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._deadly: OrderedDict[bytes, float] = OrderedDict()  # digest of a prompt -> until when, the oldest first

    async def generate(
        self, tokens: list[int], params: SampleParams, *, admitted: bool = False
    ) -> AsyncGenerator[Output, None]:
        """As Backend.generate. Raises ReplicaLostError when MOST_LOSSES replicas have died over it, then ApiError."""
        digest = sha256(array("q", tokens).tobytes()).digest()
        if time.monotonic() < self._deadly.get(digest, 0):
            why = f"{MOST_LOSSES} replicas were lost while they answered this prompt; it is not tried again"
            raise ApiError(503, why, code="prompt_refused")
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        said: list[int] = []
        for losses in range(1, MOST_LOSSES + 1):
            rest = replace(params, max_tokens=params.max_tokens - len(said))
            try:
                again = losses > 1  # it was let in once
                async with aclosing(self._backend.generate(tokens + said, rest, admitted=again)) as outputs:
                    async for output in outputs:
                        said += output.tokens
                        yield output
                        if output.finish and params.n == 1:
                            return
                return
            except ReplicaLostError as error:
                if losses == MOST_LOSSES:
                    self._deadly[digest] = time.monotonic() + REFUSED_S
                    if len(self._deadly) > REMEMBERED:
                        self._deadly.popitem(last=False)
                if losses == MOST_LOSSES or (said and params.n > 1):
                    raise
                logger.warning("a replica was lost after %d tokens of a reply; another goes on: %s", len(said), error)

    async def stats(self) -> list[Stats]:
        """As Backend.stats."""
        return await self._backend.stats()
