"""How many replicas a service needs, by what its replicas say of themselves.

More when requests wait, or the cache is full, or requests find no place; one fewer when what runs, and two standard
deviations of it as a Poisson count, leaves room in one fewer. Between the two lies a factor of about two in load, so
a steady load does not bring a replica and take it again. Serve calls Policy in its controller, to which this file is
sent as a pickle: it imports nothing of ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import ceil, sqrt
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat.engine.stats import Stats

GOAL_S = 0.5  # that requests may wait before they are begun
RECENT_S = 3.0  # what is too much for so long, is too much
KV_FULL = 0.85  # share of the cache; above it replies are soon thrown out and computed anew
FITS = 0.7  # share of the slots, and of a full cache, that one fewer may have in use
START_S = 10.0  # that a replica needs to start

TIMES = {  # of Serve's AutoscalingConfig; its own defaults bring a replica after 40 s and take it after 10 minutes
    "metrics_interval_s": 1.0,  # deprecated, but Ray 2.60 reads none of the variables that are to take its place
    "look_back_period_s": 15.0,
    "upscale_delay_s": 2.0,
    "downscale_delay_s": 30.0,
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a replica has said at a time, in seconds."""

    time: float
    tokens_waiting: float  # of prompts that are not begun
    tokens_computed: float  # since it started
    running: float  # replies
    waiting: float
    slots: float  # replies that can run at a time
    kv_usage: float  # 0 to 1
    admitted: float  # requests, since it started
    refused: float


NAMES = tuple(field.name for field in fields(Reading) if field.name != "time")


def report(stats: "Stats", *, slots: int, tokens_waiting: int, admitted: int, refused: int) -> dict[str, float]:
    """What a replica's `record_autoscaling_stats` returns, to be read by Policy. slots: the engine's max_batch."""
    return {
        "tokens_waiting": tokens_waiting,
        "tokens_computed": stats.computed_tokens,
        "running": stats.num_requests_running,
        "waiting": stats.num_requests_waiting,
        "slots": slots,
        "kv_usage": stats.kv_cache_usage_perc,
        "admitted": admitted,
        "refused": refused,
    }


class Policy:
    """Serve's autoscaling policy of a deployment whose replicas report as above."""

    def __init__(self, goal_s: float = GOAL_S) -> None:
        self._goal_s = goal_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Called with an AutoscalingContext in every round of the controller."""
        seen = [readings(context.raw_metrics, replica) for replica in context.running_replicas]
        bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return wanted(seen, context.target_num_replicas, bounds, self._goal_s), {}


def readings(metrics: Mapping[str, Mapping[Any, Sequence[Any]]], replica: Any) -> list[Reading]:
    """Those of a replica, oldest first, from Serve's time series; empty if it has said nothing yet."""
    series = [metrics.get(name, {}).get(replica, ()) for name in NAMES]
    return [Reading(points[0].timestamp, *(point.value for point in points)) for points in zip(*series, strict=False)]


def wanted(seen: Iterable[Sequence[Reading]], target: int, bounds: tuple[int, int], goal_s: float = GOAL_S) -> int:
    """Replicas that there should be.

    seen: what each running replica has said lately, oldest first.  target: replicas that there should be so far.
    bounds: fewest, most.
    """
    fewest, most = bounds
    known = [replica for replica in seen if replica]
    need = target
    if known:
        more = max(_by_waiting(known, goal_s), _by_room(known), _by_refusals(known))
        need = max(target, min(len(known), target) + more)  # what is on its way helps first
        if not more and len(known) == target and _fits(known):
            need = target - 1
    return min(max(need, fewest), most)


def _by_waiting(known: Sequence[Sequence[Reading]], goal_s: float) -> int:
    """More replicas because prompts wait: as many as do that work in the time in which they start, one at least."""
    waits_s = [min(reading.tokens_waiting for reading in _recent(replica)) / _speed(replica) for replica in known]
    if sum(waits_s) <= goal_s * len(known):
        return 0
    return max(1, int(sum(waits_s) / START_S))


def _by_room(known: Sequence[Sequence[Reading]]) -> int:
    """One more if all slots are taken while replies wait, or the caches are full."""
    recent = [_recent(replica) for replica in known]
    full = all(reading.running >= reading.slots and reading.waiting for replica in recent for reading in replica)
    kv_usage = sum(min(reading.kv_usage for reading in replica) for replica in recent) / len(known)
    return int(full or kv_usage > KV_FULL)


def _by_refusals(known: Sequence[Sequence[Reading]]) -> int:
    """More replicas in proportion to the requests that found no place.

    What one refuses is asked of the next, so as many as the one with the fewest refusals has refused.
    """
    recent = [_recent(replica) for replica in known]
    lost = min(median([b.refused - a.refused for a, b in pairwise(replica)] or [0]) for replica in recent)
    admitted = sum(median([b.admitted - a.admitted for a, b in pairwise(replica)] or [0]) for replica in recent)
    return ceil(len(known) * lost / max(admitted, 1))


def _fits(known: Sequence[Sequence[Reading]]) -> bool:
    """Whether one replica fewer would do, with room to spare, for all that was lately.

    A reply's step takes longer in company, so what fills a third of two replicas fills most of one.
    """
    less = len(known) - 1
    if not less or any(replica[-1].refused > replica[0].refused for replica in known):
        return False
    replies = sum(fmean([reading.running + reading.waiting for reading in replica]) for replica in known)
    slots = fmean([replica[-1].slots for replica in known]) * less
    kv_usage = sum(max(reading.kv_usage for reading in replica) for replica in known)
    return replies + 2 * sqrt(replies) <= FITS * slots and kv_usage <= FITS * KV_FULL * less


def _recent(replica: Sequence[Reading]) -> Sequence[Reading]:
    return [reading for reading in replica if reading.time >= replica[-1].time - RECENT_S]


def _speed(replica: Sequence[Reading]) -> float:
    """Tokens a second when it has enough to do: the most between two readings; 1 if it has done nothing yet."""
    pairs = [(b.tokens_computed - a.tokens_computed, b.time - a.time) for a, b in pairwise(replica)]
    return max([1.0, *(tokens / seconds for tokens, seconds in pairs if seconds > 0)])
