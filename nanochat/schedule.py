"""What changes over the steps of a run, as pure functions of the step; without torch."""

from nanochat.config import OptimConfig

MOMENTUM_WARMUP_STEPS = 300
FIRST_MOMENTUM = 0.85


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the full learning rate at a step (0-based) of a run of `steps`.

    Rises over `warmup_steps`, stays 1, and falls over the last `warmdown` share of the steps towards `final`, which
    it would reach at step `steps`.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is not in a run of {steps} steps")
    up = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    falling = round(config.warmdown * steps)
    left = min(1.0, (steps - step) / falling) if falling else 1.0
    return up * (left + (1.0 - left) * config.final)


def momentum(step: int, config: OptimConfig) -> float:
    """Muon's momentum at a step (0-based): rises over the first 300, from 0.85 unless the full one is less."""
    first = min(FIRST_MOMENTUM, config.momentum)
    done = min(step / MOMENTUM_WARMUP_STEPS, 1.0)
    return first + (config.momentum - first) * done
