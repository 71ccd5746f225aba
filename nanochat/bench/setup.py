"""What a process of the decoding benchmark is told: which model it runs and how, and what is asked of it."""

import argparse
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat.checkpoint import open_weights
from nanochat.config import ModelConfig
from nanochat.engine.runner import BLOCK, Precision
from nanochat.files import Folder
from nanochat.model import weight_shapes


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, and how one process runs it."""

    config: ModelConfig
    vocab_size: int
    folder: Path | None = None  # of a bundle; None: random weights
    precision: Precision
    device: str
    threads: int
    native: bool = True
    deterministic: bool = False
    speculate: int = 0
    batch: int = 1  # most requests at a time
    kv_tokens: int
    step_tokens: int

    @contextmanager
    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        """All by name, each made or read when it is asked for."""
        if self.folder is None:
            yield RandomWeights(self.config, self.vocab_size)
            return
        with open_weights(Folder(self.folder)) as (_, _, weights):
            yield weights


def room(args: argparse.Namespace, prompt: int, new: int, batch: int) -> int:
    """Tokens of the longest text when `batch` such requests come at once.

    While the last prompts are read, the first requests draw already.
    """
    reading: int = -(-batch * prompt // (args.step_tokens - batch))  # steps
    speculate: int = args.speculate
    return prompt + (reading + new + 1) * (1 + speculate)


def setup_of(args: argparse.Namespace, precision: Precision, prompt: int, new: int, batch: int = 1) -> Setup:
    """A process for `batch` requests at once, with a cache that holds them whole."""
    blocks = -(-room(args, prompt, new, batch) // BLOCK) + 1
    return Setup(
        config=args.config,
        vocab_size=args.vocabulary,
        folder=args.trained,
        precision=precision,
        device=args.device,
        threads=args.threads,
        native=not args.torch,
        deterministic=args.deterministic,
        speculate=args.speculate,
        batch=batch,
        kv_tokens=batch * blocks * BLOCK,
        step_tokens=args.step_tokens,
    )


@dataclass(frozen=True)
class Load:
    """Random requests that come at once."""

    batch: int
    prompt: int  # tokens of each
    new: int  # steps that are timed
    shared: int = 0  # first tokens that all prompts of all loads have in common
    seed: int = 0

    def prompts(self, vocab_size: int) -> Tensor:
        """(batch, prompt) int64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        tokens = torch.randint(vocab_size, (self.batch, self.prompt), generator=generator)
        start = torch.randint(vocab_size, (self.shared,), generator=torch.Generator().manual_seed(0))
        tokens[:, : self.shared] = start
        return tokens


@dataclass(frozen=True)
class Run:
    """What a load took."""

    first: list[int]  # each request's first token, in the order of the prompts
    first_s: list[float]  # seconds until it was there
    seconds: float  # of the `new` steps after all had theirs
    drawn: int  # tokens in these steps
    held: float  # tokens in the cache, all requests together, at the mean of these steps
    cached: int = 0  # tokens of prompts that were in the cache already
    preempted: int = 0

    @property
    def rate(self) -> float:
        """tokens/s after the first ones."""
        return self.drawn / self.seconds


class RandomWeights(Mapping[str, Tensor]):
    """Normal numbers by transformers' names, fp32; a tensor is made anew each time it is asked for.

    std 1 / sqrt(width): logits have a std of about 1, so that no reply is one token over and over.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        self._shapes = weight_shapes(config, vocab_size)
        self._std = config.width**-0.5

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(self._shapes[name]).normal_(std=self._std, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
