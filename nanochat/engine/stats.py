"""What the engine counts: plain numbers under vLLM's metric names. Knows no Prometheus and no clock."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from nanochat.engine.sequence import Finish, Sequence

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = tuple(float(2**power) for power in range(17))  # 1 to 65,536
SEQUENCES = tuple(float(2**power) for power in range(11))  # 1 to 1,024


@dataclass(slots=True)
class Histogram:
    """How often a value fell up to each bound and above the one before; the last count is of those above all."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)  # one more than bounds
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> "Histogram":
        return Histogram(self.bounds, self.counts.copy(), self.sum)


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine's load now, and its work since it was made. A request with n replies counts as n."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage_perc: float  # 0 to 1: blocks that running sequences hold
    kv_tokens: int  # size of the cache
    prefix_cache_queries: int  # tokens of prompts that were let in
    prefix_cache_hits: int  # and of these, found in the cache
    num_preemptions: int
    prompt_tokens: int  # of prompts that are complete: computed or cached
    prompt_tokens_cached: int
    generation_tokens: int
    computed_tokens: int  # tokens that went through the model: prompts, replies, drafts, and all of them again
    spec_decode_num_draft_tokens: int
    spec_decode_num_accepted_tokens: int
    request_success: dict[Finish, int]
    iteration_tokens_total: Histogram  # tokens of a step
    num_sequences: Histogram  # sequences of a step
    time_to_first_token_seconds: Histogram  # from arrival
    inter_token_latency_seconds: Histogram  # between two steps that gave a reply tokens
    request_queue_time_seconds: Histogram  # from arrival to the first step with a part in it
    request_prefill_time_seconds: Histogram  # from there to the first token
    request_decode_time_seconds: Histogram  # from there to the last
    e2e_request_latency_seconds: Histogram  # from arrival to the end
    request_prompt_tokens: Histogram
    request_generation_tokens: Histogram


@dataclass(slots=True)
class Counters:
    """What an engine has counted so far."""

    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    computed_tokens: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    request_success: dict[Finish, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "timeout": 0, "error": 0}
    )
    iteration_tokens_total: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    num_sequences: Histogram = field(default_factory=lambda: Histogram(SEQUENCES))
    time_to_first_token_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    inter_token_latency_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_queue_time_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_prefill_time_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_decode_time_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    e2e_request_latency_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))

    def step(self, tokens: int, sequences: int) -> None:
        """A step went through the model."""
        self.computed_tokens += tokens
        self.iteration_tokens_total.observe(tokens)
        self.num_sequences.observe(sequences)

    def began(self, sequence: Sequence, now: float) -> None:
        """A sequence has part in a step for the first time."""
        sequence.scheduled = now
        self.request_queue_time_seconds.observe(now - sequence.arrived)

    def drew(self, sequence: Sequence, tokens: int, now: float) -> None:
        """A sequence got tokens, one at least."""
        self.generation_tokens += tokens
        if sequence.first is None:
            assert sequence.scheduled is not None, "tokens without a step"
            sequence.first = now
            self.prompt_tokens += sequence.prompt
            self.prompt_tokens_cached += sequence.cached
            self.time_to_first_token_seconds.observe(now - sequence.arrived)
            self.request_prefill_time_seconds.observe(now - sequence.scheduled)
        else:
            self.inter_token_latency_seconds.observe(now - sequence.latest)
        sequence.latest = now

    def ended(self, sequence: Sequence, finish: Finish, now: float) -> None:
        """A sequence is over."""
        self.request_success[finish] += 1
        self.e2e_request_latency_seconds.observe(now - sequence.arrived)
        self.request_prompt_tokens.observe(sequence.prompt)
        self.request_generation_tokens.observe(sequence.known - sequence.prompt)
        if sequence.first is not None:
            self.request_decode_time_seconds.observe(sequence.latest - sequence.first)

    def values(self) -> dict[str, Any]:
        """By name, copied."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return {name: value if isinstance(value, int) else value.copy() for name, value in found.items()}
