"""Sizes of the model and of its training, as plain frozen data.

Every class checks itself when it is made, so a wrong size fails before a GPU is asked for.
Nothing here imports torch: the planner and the pipeline file reader use these too.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One dial, `depth`; the width and the heads follow from it. The vocabulary comes with the data."""

    depth: int
    context: int  # tokens
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int = 128
    aspect: int = 64  # width = depth * aspect, rounded up to whole heads

    # A misspelt key in a pipeline file is an error.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}; a model needs at least 1 layer")
        if self.context < 1 or self.context % 128:
            raise ValueError(
                f"context is {self.context}; attention tiles are 128 tokens, "
                f"so use {max(1, math.ceil(self.context / 128)) * 128}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding turns pairs, so use an even number")
        if self.aspect < 1:
            raise ValueError(f"aspect is {self.aspect}; use at least 1 (64 is usual)")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            able = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(f"kv_heads is {self.kv_heads}; {self.heads} query heads can be shared by {able}")

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return -(-self.depth * self.aspect // self.head_dim) * self.head_dim

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.width // self.head_dim

    @property
    def key_heads(self) -> int:
        """Heads that keys and values have: `kv_heads`, or as many as query heads."""
        return self.kv_heads or self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """How weights move. Rates are those of the flat part of the schedule.

    embed_lr and head_lr are for width 768 and scaled by (width / 768) ** -0.5, as nanochat does.
    """

    name: Literal["muon", "adamw"] = "muon"
    matrix_lr: float = 0.02
    embed_lr: float = 0.2
    head_lr: float = 0.004
    weight_decay: float = 0.0
    momentum: float = 0.95  # of Muon
    warmup_steps: int = 0
    warmdown: float = 0.2  # share of the steps, at the end, over which the rate falls
    final: float = 0.0  # share of the rate that is left at the last step
    clip: float = 1.0  # largest norm of the whole gradient

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("matrix_lr", "embed_lr", "head_lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        for name in ("warmdown", "final", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
