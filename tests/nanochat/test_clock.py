"""Parts of a step, by a clock and by a device that are both made up."""

from collections.abc import Iterator

import pytest
import torch

from nanochat import clock
from nanochat.clock import OTHER, PARTS, Clock


class Device:
    """A queue that reaches its events long after they were put into it: each has the time of the device then."""

    def __init__(self) -> None:
        self.at_ms = 0.0
        self.reached_ms = 0.0

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.ms: float | None = None

    def record(self, stream: str) -> None:
        assert stream == "the stream of cuda:1"
        self.ms = self.device.at_ms

    def query(self) -> bool:
        return self.ms is not None and self.ms <= self.device.reached_ms

    def elapsed_time(self, other: "Event") -> float:
        """Raises as CUDA does, if the device is not there yet."""
        if not other.query():
            raise RuntimeError("events are not complete")
        assert self.ms is not None
        assert other.ms is not None
        return other.ms - self.ms


def times(*seconds: float) -> Iterator[float]:
    return iter(seconds)


def test_parts_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = times(10.0, 10.5, 11.0, 13.0, 14.0, 17.0, 17.25, 19.0, 20.0)
    monkeypatch.setattr(clock, "perf_counter", lambda: next(now))
    watch = Clock(torch.device("cpu"))
    watch.begin()
    for part in ("data", "forward", "backward", "forward", "backward", "exchange", "optimizer"):
        watch.mark(part)
    parts = watch.end()
    assert parts == {
        "data": 0.5,
        "forward": 0.5 + 1.0,
        "backward": 2.0 + 3.0,
        "exchange": 0.25,
        "optimizer": 1.75,
        "other": 1.0,
    }
    assert sum(parts.values()) == 20.0 - 10.0


def test_a_step_knows_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = times(0.0, 1.0, 3.0, 100.0, 104.0, 104.5)
    monkeypatch.setattr(clock, "perf_counter", lambda: next(now))
    watch = Clock(torch.device("cpu"))
    watch.begin()
    watch.mark("data")
    assert watch.end() == dict.fromkeys(PARTS, 0.0) | {"data": 1.0, OTHER: 2.0}
    watch.begin()
    watch.mark("backward")
    assert watch.end() == dict.fromkeys(PARTS, 0.0) | {"backward": 4.0, OTHER: 0.5}


def test_what_is_no_part_is_refused() -> None:
    watch = Clock(torch.device("cpu"))
    watch.begin()
    with pytest.raises(AssertionError, match="'bakcward' is no part of a step; use one of data, forward"):
        watch.mark("bakcward")


def test_on_cuda_nothing_waits_and_the_newest_complete_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host and device are three steps apart; asking a time that is not there yet would raise."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda asked: f"the stream of {asked}")
    watch = Clock(torch.device("cuda:1"))

    def step(began_ms: float) -> dict[str, float]:
        device.at_ms = began_ms
        watch.begin()
        for part, ms in (("forward", 2.0), ("backward", 4.0), ("optimizer", 1.0)):
            device.at_ms += ms + began_ms / 100
            watch.mark(part)
        device.at_ms += 0.5
        return watch.end()

    def parts(began_ms: float) -> dict[str, float]:
        seconds = {"forward": 2.0, "backward": 4.0, "optimizer": 1.0}
        more = {part: (ms + began_ms / 100) / 1000 for part, ms in seconds.items()}
        return pytest.approx(dict.fromkeys(PARTS, 0.0) | more | {OTHER: 0.0005}, rel=1e-9, abs=1e-12)  # type: ignore[return-value]

    assert step(100) == {}
    assert step(200) == {}
    assert step(240) == {}
    device.reached_ms = 245  # in the middle of the third
    assert step(300) == parts(200)
    assert step(400) == parts(200)
    device.reached_ms = 450
    assert step(500) == parts(400)
