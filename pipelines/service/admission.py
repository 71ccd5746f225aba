"""Whether a replica takes one more request: by what waits already, and by when its first token would come.

A forecast from what the engine did so far, in steps of the engine: a step costs some time, a token of a prompt costs
some on top, a reply holds its place for so many steps. No Ray, no HTTP, no clock: it is told how long each step took.
Nothing is refused that finds nobody before it, so a wrong forecast can never lock a replica: while somebody waits
there are steps, and each one mends it.
"""

import threading
from dataclasses import dataclass, field
from math import ceil, exp, sqrt

from nanochat.engine.stats import Stats
from pipelines.service.protocol import OverloadedError

SIGMAS = 3  # one forecast in 700 is wrong by more than three standard deviations
# What is believed before anything was measured, as if that many replies had ended so.
STEPS_OF_A_REPLY, REPLIES_BELIEVED = 64.0, 8
STEPS_KEPT = 64  # steps after which what was measured counts for 1/e
REPLIES_KEPT = 8  # the same in replies, for each place


@dataclass(slots=True)
class Mean:
    """top / bottom of all that was added; what lies `memory` of bottom back counts for 1/e."""

    memory: float
    top: float = 0.0
    bottom: float = 0.0

    def add(self, top: float, bottom: float) -> None:
        kept = exp(-bottom / self.memory)
        self.top, self.bottom = self.top * kept + top, self.bottom * kept + bottom

    @property
    def value(self) -> float:
        """0 before anything was added."""
        return self.top / self.bottom if self.bottom else 0.0


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that was let in, until its last reply has ended. Every call may come from any thread."""

    admission: "Admission"
    prompt_tokens: int
    replies: int  # that have not ended
    waits: bool = field(default=True)  # for its first token

    def answered(self) -> None:
        """A token of it came. Nothing happens the second time."""
        if self.waits:
            self.admission.close(self, 0)

    def ended(self, replies: int = 1) -> None:
        """Replies of it are over."""
        self.admission.close(self, replies)

    def leave(self) -> None:
        """All of it is over, however far it was. Nothing happens if it was over already."""
        self.admission.close(self, self.replies)


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a request's first token would come."""

    seconds: float  # on average
    at_most_s: float  # but for one in 700
    waiting_tokens: int  # of prompts before it and its own
    ends: int  # replies that have to end before it begins


class Admission:
    """Counts who is in, and learns what the engine's steps cost.

    places: replies that are made at a time (the engine's max_batch).  step_tokens: the most in a step.
    max_queued_tokens: who comes while more tokens of prompts wait is refused; None: as many as the cache holds.
    """

    def __init__(
        self, *, places: int, kv_tokens: int, step_tokens: int, max_wait_s: float, max_queued_tokens: int | None = None
    ) -> None:
        self._places, self._kv_tokens, self._step_tokens = places, kv_tokens, step_tokens
        self._max_wait_s = max_wait_s
        self._max_queued_tokens = kv_tokens if max_queued_tokens is None else max_queued_tokens
        self.admitted = self.refused = 0  # requests so far
        self._lock = threading.Lock()
        self._open = self._waiting = self._waiting_tokens = 0  # replies; requests and prompts without a first token
        self._begun = 0  # tokens of waiting prompts that are computed already
        self._ended = self._answered = 0  # since the last step: replies; tokens of prompts that got a first token
        self._before: _Work | None = None
        self._held = 0.0  # part of the cache that replies hold
        self._running = 0
        self._last_s = 0.0  # the last step's time: whoever comes now waits for the end of one that runs
        self._step_s = Mean(STEPS_KEPT)  # of a step without prompts
        self._step_replies = Mean(STEPS_KEPT)  # of such a step
        self._token_s = Mean(STEPS_KEPT * step_tokens, bottom=step_tokens)  # of a prompt's token on top of that
        self._reply_steps = Mean(REPLIES_KEPT * places, STEPS_OF_A_REPLY * REPLIES_BELIEVED, REPLIES_BELIEVED)
        self._fresh = Mean(STEPS_KEPT * step_tokens, step_tokens, step_tokens)  # part of a prompt that is not cached

    @property
    def waiting_tokens(self) -> int:
        """Of prompts that have no first token yet, as far as they are not computed."""
        return self._waiting_tokens - self._begun

    def admit(self, prompt_tokens: int, replies: int = 1, *, admitted: bool = False) -> Ticket:
        """Lets a request in, or raises OverloadedError. Whoever is let in has to be told to be over, by its ticket.

        admitted: it was let in before, by another replica that is lost.
        """
        with self._lock:
            if not admitted:
                self._check(prompt_tokens)
            self.admitted += 1
            self._open += replies
            self._waiting += 1
            self._waiting_tokens += prompt_tokens
        return Ticket(self, prompt_tokens, replies)

    def forecast(self, prompt_tokens: int) -> Forecast:
        """For a request that came now."""
        with self._lock:
            return self._forecast(prompt_tokens)

    def stepped(self, stats: Stats, seconds: float) -> None:
        """The engine has made a step, which took so long. stats: after it."""
        now = _Work.of(stats)
        with self._lock:
            before, self._before = self._before, now
            self._held, self._running = stats.kv_cache_usage_perc, stats.num_requests_running
            self._last_s = seconds
            ended, self._ended = self._ended, 0
            answered, self._answered = self._answered, 0
            if before is None:
                return
            prompts = now.prefill - before.prefill
            if prompts <= 0:
                self._step_s.add(seconds, 1)
                self._step_replies.add(now.places - before.places, 1)
            else:
                self._token_s.add(max(0.0, seconds - self._step_s.value), prompts)
            complete = now.prompts - before.prompts
            self._fresh.add(complete, answered)
            self._begun = min(max(0, self._begun + prompts - complete), self._waiting_tokens)
            self._reply_steps.add(now.places - before.places, ended)

    def close(self, ticket: Ticket, replies: int) -> None:
        """Called by the ticket."""
        with self._lock:
            if ticket.waits:
                ticket.waits = False
                self._waiting -= 1
                self._waiting_tokens -= ticket.prompt_tokens
                self._begun = min(self._begun, self._waiting_tokens)
                self._answered += 0 if replies else ticket.prompt_tokens
            replies = min(replies, ticket.replies)
            ticket.replies -= replies
            self._open -= replies
            self._ended += replies

    def _check(self, prompt_tokens: int) -> None:
        forecast = self._forecast(prompt_tokens)
        if not self._waiting and not forecast.ends:
            return
        # Whatever the size of its prompt, as if it filled a step: else short ones would keep long ones out for ever.
        late = self._forecast(self._step_tokens).at_most_s - self._max_wait_s
        too_many = self._waiting_tokens - self._max_queued_tokens
        if too_many > 0 or late > 0:
            self.refused += 1
            raise OverloadedError(self._said(), max(late, too_many * self._token_s.value))

    def _said(self) -> str:
        return f"{self._waiting} requests with {self._waiting_tokens} tokens wait already"

    def _forecast(self, prompt_tokens: int) -> Forecast:
        waiting = self._waiting_tokens + prompt_tokens
        places, ends = self._room(prompt_tokens)
        # Ends come like a Poisson process; on top of that, the mean is known from so many replies only.
        spread = sqrt(ends + ends * ends / self._reply_steps.bottom)
        on_average = self._seconds(places, ends, waiting) + self._last_s / 2
        at_most = self._seconds(places, ends + SIGMAS * spread, waiting) + self._last_s
        return Forecast(on_average, at_most, waiting, ends)

    def _room(self, prompt_tokens: int) -> tuple[int, int]:
        """Replies that are made at a time, and how many have to end before a new request has place and cache."""
        if not self._open:
            return self._places, 0  # what the last step left behind was cancelled since
        free = self._kv_tokens * (1 - self._held)
        lacking = self._waiting_tokens - self._begun + prompt_tokens - free
        if lacking <= 0 or not self._running:
            return self._places, max(0, self._open + 1 - self._places)
        each = self._kv_tokens * self._held / self._running
        return self._running, max(0, self._open + 1 - self._running, ceil(lacking / each))

    def _seconds(self, places: int, ends: float, waiting: int) -> float:
        """Until the last of so many waiting tokens is computed, after so many ends of replies."""
        decoding = min(self._open, places)
        tokens = max(1.0, (waiting - self._begun) * self._fresh.value)
        prefill_steps = ceil(tokens / max(1, self._step_tokens - decoding))
        reply_steps = ends * self._reply_steps.value / places
        more = max(0.0, decoding - self._step_replies.value)  # replies in a step than in those measured
        step_s = self._step_s.value + more * self._token_s.value
        return max(reply_steps, prefill_steps) * step_s + tokens * self._token_s.value


@dataclass(frozen=True, slots=True)
class _Work:
    """What an engine has done since it was made, as far as it matters here."""

    prefill: int = 0  # tokens computed of prompts, and again after a preemption
    prompts: int = 0  # tokens of prompts that are complete, without those from the cache
    places: float = 0.0  # replies of each step, summed

    @classmethod
    def of(cls, stats: Stats) -> "_Work":
        first = sum(stats.time_to_first_token_seconds.counts)
        # A step gives a reply one token and what was right of its draft, and computes one and the whole draft.
        drawn = stats.generation_tokens - first - stats.spec_decode_num_accepted_tokens
        prefill = stats.computed_tokens - stats.spec_decode_num_draft_tokens - drawn
        return cls(prefill, stats.prompt_tokens - stats.prompt_tokens_cached, stats.num_sequences.sum)
