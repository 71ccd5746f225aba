"""Learning rate and momentum by hand."""

import pytest

from nanochat.config import OptimConfig
from nanochat.schedule import momentum, rate


def test_rate_by_hand() -> None:
    config = OptimConfig(warmup_steps=2, warmdown=0.4, final=0.1)
    # 10 steps: up over 2, down over the last 4, towards 0.1: 1, 3/4, 1/2, 1/4 of the way above it
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]
    assert [rate(step, 10, config) for step in range(10)] == pytest.approx(expected)


def test_rate_without_warm_up_or_down_is_one() -> None:
    config = OptimConfig(warmup_steps=0, warmdown=0.0)
    assert [rate(step, 5, config) for step in range(5)] == [1.0] * 5


def test_rate_outside_the_run_is_refused() -> None:
    for step in (-1, 5):
        with pytest.raises(ValueError, match="is not in a run of 5 steps"):
            rate(step, 5, OptimConfig())


def test_momentum_by_hand() -> None:
    config = OptimConfig(momentum=0.95)
    assert [momentum(step, config) for step in (0, 150, 300, 10_000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum(0, OptimConfig(momentum=0.5)) == momentum(400, OptimConfig(momentum=0.5)) == 0.5
