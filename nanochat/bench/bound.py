"""The bandwidth bound of decoding: what a step must read, and how fast this machine reads."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from nanochat.bench.setup import Setup
from nanochat.config import ModelConfig
from nanochat.cpp import NoCompilerError
from nanochat.engine.native import read_bandwidth
from nanochat.engine.runner import BLOCK, Precision

TRIES = 5


def kv_bytes(config: ModelConfig, precision: Precision) -> int:
    """Keys and values of one token, all layers; bf16 beside bf16 and int8 weights."""
    return 2 * config.depth * config.key_heads * config.head_dim * (4 if precision == "fp32" else 2)


def step_bytes(setup: Setup, weight_bytes: int, held: float, shared: int) -> float:
    """What a step must read at least.

    weight_bytes: of all matrices and the head.  held: tokens in the cache, all requests together.  shared: first
    tokens that all prompts have in common; their whole blocks are there once.
    """
    twice = (setup.batch - 1) * (shared // BLOCK * BLOCK)
    return weight_bytes + (held - twice) * kv_bytes(setup.config, setup.precision)


class Reader:
    """Measures the read bandwidth of the device, in a process that sleeps otherwise."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._setup = setup

    def rates(self, size: int) -> dict[str, float]:
        """bytes/s over `size` bytes: of the best of the C++ library's three read kernels, else of three of torch's."""
        if self._setup.device == "cpu" and self._setup.native:
            with contextlib.suppress(NoCompilerError):  # make_runner has said so
                return {"best of three in C++": read_bandwidth(self._setup.threads, size)}
        memory = torch.ones(size // 4, device=self._setup.device)
        kernels: dict[str, Callable[[], Any]] = {
            "sum of fp32": memory.sum,
            "sum of int64": memory.view(torch.int64).sum,
            "largest of fp32": memory.amax,
        }
        return {name: size / min(self._seconds(kernel) for _ in range(TRIES)) for name, kernel in kernels.items()}

    def _seconds(self, kernel: Callable[[], Any]) -> float:
        times = 8 if self._setup.device == "cuda" else 1  # a launch takes a GPU some hundredths of a read
        began = self._now()
        for _ in range(times):
            kernel()
        return (self._now() - began) / times

    def _now(self) -> float:
        if self._setup.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
