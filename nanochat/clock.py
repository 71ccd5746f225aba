"""Where the time of a training step goes: parts that add up to the step.

On a CPU a part is what passed on the clock. On CUDA it is what passed on the device, between events in its queue: host
work that the device did not wait for costs nothing. The events are read once they are complete, so nothing waits.
"""

from collections import deque
from itertools import pairwise
from time import perf_counter

import torch

PARTS = ("data", "forward", "backward", "exchange", "optimizer")  # exchange: communication that nothing hides
OTHER = "other"  # what was not marked

# One moment: the host's clock in seconds, or an event that the device will pass.
Moment = float | torch.cuda.Event
# The moments of a step; each but the first ends a time that was spent on the part beside it.
Step = list[tuple[Moment, str]]


class Clock:
    """The parts of one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._step: Step = []
        self._pending: deque[Step] = deque()  # on CUDA: ended, but not read yet
        self._newest: dict[str, float] = {}

    def begin(self) -> None:
        """A step begins."""
        self._step = [(self._now(), OTHER)]

    def mark(self, part: str) -> None:
        """The time since the last mark, or `begin`, was spent on `part`; may be called many times a step."""
        assert part in PARTS, f"{part!r} is no part of a step; use one of {', '.join(PARTS)}"
        self._step.append((self._now(), part))

    def end(self) -> dict[str, float]:
        """Seconds of each part of this step, `other` included; they add up to the step.

        On CUDA: of the newest step that the device is done with; empty before there is one.
        """
        self._step.append((self._now(), OTHER))
        self._pending.append(self._step)
        while self._pending and _passed(self._pending[0][-1][0]):
            self._newest = _parts(self._pending.popleft())
        return dict(self._newest)

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _passed(moment: Moment) -> bool:
    return isinstance(moment, float) or bool(moment.query())  # type: ignore[no-untyped-call]


def _between(first: Moment, last: Moment) -> float:
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return last - first
    return float(first.elapsed_time(last)) / 1000


def _parts(step: Step) -> dict[str, float]:
    parts = dict.fromkeys((*PARTS, OTHER), 0.0)
    for (before, _), (after, part) in pairwise(step):
        parts[part] += _between(before, after)
    return parts
