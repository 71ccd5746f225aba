"""What the engine says about a request, and one reply while it lives. Data only; needs no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # whoever only needs Output, as the gateway, does not wait for torch
    from nanochat.engine.runner import Ints
    from nanochat.engine.sampler import SampleParams
    from nanochat.engine.speculate import Lookup

Finish = Literal["stop", "length", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one reply."""

    id: int
    tokens: list[int]  # every token drawn, the one that ended the reply included
    logprobs: list[float] = field(default_factory=list)  # of those tokens, where the request asked for them
    top: list[dict[int, float]] = field(default_factory=list)  # for each token the likeliest ones, where asked for
    finish: Finish | None = None  # length: max_tokens, context or cache used up; error: the logits are not finite
    index: int = 0  # which of the request's n replies

    def __reduce__(self) -> tuple[type["Output"], tuple[Any, ...]]:
        """Pickled for every token that is served: what dataclass does takes three times as long."""
        return Output, (self.id, self.tokens, self.logprobs, self.top, self.finish, self.index)


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and one reply to it, as far as it is.

    Of its `known` tokens the first `computed` have their keys in `blocks`; a step lets the second number catch up with
    the first. ids[known:] is room for what is to come, a draft for instance.
    """

    id: int  # the request's
    index: int  # which of its replies
    order: int  # of arrival, over all sequences
    params: "SampleParams"
    seed: int
    stop: frozenset[int]
    ids: "Ints"  # (capacity,) its tokens
    prompt: int  # tokens of the prompt
    arrived: float  # seconds of the engine's clock, as all times here
    known: int  # tokens of prompt and reply
    computed: int = 0
    cached: int = 0  # tokens of the prompt that were found in the cache
    lookup: "Lookup | None" = None  # drafts its next tokens

    # Kept by the block pool
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    sealed: int = 0  # blocks whose content others can find
    mark: int = 0  # when so many tokens are computed, the pool has something to note

    # Kept by the scheduler
    row: "Ints | None" = None  # its blocks, in the block tables; None while it waits
    slot: int = -1  # number of that row
    preempted: bool = False  # ever

    # Times
    scheduled: float | None = None  # when it first got tokens of a step
    first: float | None = None  # when its first token came
    latest: float = 0.0  # when its last one came

    @property
    def capacity(self) -> int:
        """The most tokens that prompt and reply can have."""
        return len(self.ids)
