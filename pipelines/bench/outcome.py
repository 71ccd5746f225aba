"""What became of a load: every reply with its times, and what can be said of them all."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
SHARES = (50, 90, 99)


@dataclass(slots=True)
class Reply:
    """One request and its reply. Seconds count from the beginning of the load, lengths are in tokens."""

    prompt: int
    new: int  # how many were asked for
    due_s: float  # when it had to be sent; in a closed loop, when it was
    sent_s: float = 0.0
    end_s: float = 0.0
    times: "array[float]" = field(default_factory=lambda: array("d"))  # of each event with text
    tokens: int = 0  # that came
    wrong: str | None = None  # kind of error
    said: str = ""  # what the service said about it

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.due_s

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)

    def between_s(self, until_s: float) -> Floats:
        """Times between tokens, as far as they came before `until_s`. Tokens that share an event came at once."""
        times = np.frombuffer(self.times)
        gaps = np.diff(times[times <= until_s])
        together = max(0, self.tokens - len(times)) if len(gaps) == len(times) - 1 else 0
        return np.concatenate([gaps, np.zeros(together)])

    def tokens_until(self, until_s: float) -> float:
        """Tokens that came before; all events count alike."""
        came = int(np.searchsorted(np.frombuffer(self.times), until_s, side="right"))
        return self.tokens * came / len(self.times)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A load that was run."""

    replies: Sequence[Reply]
    window_s: float  # as long as all clients had something to ask; in an open loop, until the last reply ended
    closed: bool
    cpu_s: float  # of the client's process
    wall_s: float
    interrupted: bool = False

    @property
    def good(self) -> list[Reply]:
        """Replies without an error."""
        return [reply for reply in self.replies if reply.wrong is None]

    @property
    def until_s(self) -> float:
        """What came later is not counted: not all clients were busy any more."""
        return self.window_s if self.closed else float("inf")

    @property
    def tokens_per_s(self) -> float:
        """Of the replies."""
        return sum(reply.tokens_until(self.until_s) for reply in self.good) / self.window_s

    @property
    def requests_per_s(self) -> float:
        """Replies that ended; in a closed loop a part of one counts as that part."""
        parts = (reply.tokens_until(self.until_s) / reply.tokens for reply in self.good)
        return sum(parts) / self.window_s


@dataclass(frozen=True, slots=True)
class Slo:
    """What users are promised."""

    ttft_s: float
    per_token_s: float

    def kept(self, reply: Reply) -> bool:
        """By a reply without an error."""
        return reply.ttft_s <= self.ttft_s and reply.per_token_s <= self.per_token_s


def shares(values: Floats) -> dict[str, float] | None:
    """p50, p90, p99, the mean and the largest; None if there is no value."""
    if not len(values):
        return None
    found = {f"p{share}": float(np.percentile(values, share)) for share in SHARES}
    return found | {"mean": float(values.mean()), "max": float(values.max())}


def summary(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    """All runs of a load as one."""
    good = [reply for outcome in outcomes for reply in outcome.good]
    window_s = sum(outcome.window_s for outcome in outcomes)
    gaps = [reply.between_s(outcome.until_s) for outcome in outcomes for reply in outcome.good]
    errors = Counter(reply.wrong for outcome in outcomes for reply in outcome.replies if reply.wrong)
    tokens, events = sum(reply.tokens for reply in good), sum(len(reply.times) for reply in good)
    in_flight_s = sum(min(r.end_s, o.until_s) - r.sent_s for o in outcomes for r in o.good)
    read = sum(r.prompt for o in outcomes for r in o.good if r.times[0] <= o.until_s)
    kept = sum(o.requests_per_s * o.window_s * _kept_share(o, slo) for o in outcomes)
    return {
        "seconds": window_s,
        "requests": sum(len(outcome.replies) for outcome in outcomes),
        "errors": dict(errors.most_common()),
        "said": {kind: _said(outcomes, kind) for kind in errors},
        "short_replies": sum(reply.tokens < reply.new for reply in good),
        "reply_tokens_per_s": _mean([o.tokens_per_s for o in outcomes], [o.window_s for o in outcomes]),
        "prompt_tokens_per_s": read / window_s,
        "requests_per_s": _mean([o.requests_per_s for o in outcomes], [o.window_s for o in outcomes]),
        "in_flight": in_flight_s / window_s,
        "ttft_s": shares(np.array([reply.ttft_s for reply in good])),
        "between_tokens_s": shares(np.concatenate(gaps) if gaps else np.empty(0)),
        "latency_s": shares(np.array([reply.end_s - reply.due_s for reply in good])),
        "slo": {"ttft_s": slo.ttft_s, "per_token_s": slo.per_token_s},
        "goodput_requests_per_s": kept / window_s,
        "tokens_per_event": tokens / events if events else None,
        "sent_late_s": shares(np.array([r.sent_s - r.due_s for o in outcomes for r in o.replies if not o.closed])),
        "client_cpu_share": sum(o.cpu_s for o in outcomes) / sum(o.wall_s for o in outcomes),
        "client_cpu_us_per_token": 1e6 * sum(o.cpu_s for o in outcomes) / tokens if tokens else None,
    }


def _kept_share(outcome: Outcome, slo: Slo) -> float:
    """Of the replies without an error, those that kept the SLO."""
    good = outcome.good
    return sum(map(slo.kept, good)) / len(good) if good else 0.0


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return float(np.average(values, weights=weights))


def _said(outcomes: Sequence[Outcome], kind: str) -> str:
    """The service's own words, of the first such error."""
    return next(reply.said for outcome in outcomes for reply in outcome.replies if reply.wrong == kind)
