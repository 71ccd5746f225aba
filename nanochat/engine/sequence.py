"""One request while it lives in the engine, and what the engine says about it. Data only; needs no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nanochat.engine.sampler import SampleParams

if TYPE_CHECKING:
    from nanochat.attention import Cache

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one request."""

    id: int
    tokens: list[int]  # every token drawn, the one that ended the reply included
    logprobs: list[float]  # of those tokens under the model, before temperature and filters
    finish: Finish | None = None  # stop: a stop token came; length: max_tokens or the context is used up


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine's load now, and its work since it was made."""

    running: int
    waiting: int
    kv_reserved: int  # tokens of cache that running requests hold
    kv_tokens: int  # tokens of cache there are
    prompt_tokens: int
    new_tokens: int


@dataclass(slots=True)
class Sequence:
    """A prompt and its reply so far."""

    id: int
    prompt: list[int]
    params: SampleParams
    seed: int
    stop: frozenset[int]
    capacity: int  # most tokens it can have: prompt and reply
    cache: "Cache | None" = None  # None while it waits
    reply: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of the reply so far."""
        return len(self.prompt) + len(self.reply)

    def append(self, token: int) -> Finish | None:
        """Takes the next token of the reply; says whether it was the last, and why."""
        self.reply.append(token)
        if token in self.stop:
            return "stop"
        return "length" if self.tokens >= self.capacity else None
