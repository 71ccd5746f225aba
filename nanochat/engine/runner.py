"""What the engine asks of a device: one forward pass over tokens of many sequences, and a cache for their keys.

The cache is made of blocks of 16 tokens; which block belongs to whom is the engine's business. A runner only reads
and writes where it is told. Knows no requests and no sampling.
"""

# N sequences, T tokens, R wanted rows, W the longest block table, V vocabulary

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.model import weight_shapes

BLOCK = 16  # tokens of a block

Ints = npt.NDArray[np.int32]
Precision = Literal["fp32", "bf16", "int8"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step: those of a sequence side by side, the sequences one after the other.

    Token i of a sequence stands at position past + i; its keys go to slot position % BLOCK of block
    table[position // BLOCK], and it attends to all positions up to its own. No two sequences of a batch write to the
    same block; they may read the same ones.
    """

    tokens: Ints  # (T,)
    counts: Ints  # (N,) tokens of each sequence, 1 or more; they sum to T
    past: Ints  # (N,) tokens of each sequence whose keys are in the cache already
    tables: Ints  # (N, W) blocks of each sequence in order, padded with 0
    wanted: Ints  # (R,) rows of `tokens` whose logits are asked for, ascending


class Runner(Protocol):
    """A model on a device. Weights are packed for it when it is made; the caller may drop its own."""

    config: ModelConfig
    vocab_size: int
    precision: Precision
    deterministic: bool  # whether a row's logits have the same bits whatever else is in the batch
    blocks: int
    block_bytes: int  # of one block, all layers
    weight_bytes: int  # that a step reads: all matrices and the head; of the embedding only rows are read

    def forward(self, batch: Batch) -> Tensor:
        """Writes the keys of all tokens and returns the soft-capped logits of the wanted rows, (R, V) fp32.

        The tensor is valid until the next call.
        """

    def copy(self, source: int, target: int) -> None:
        """Copies the keys and values of one block into another."""


def make_runner(  # noqa: PLR0913 (each says what is served, or on what)
    config: ModelConfig,
    vocab_size: int,
    weights: Mapping[str, Tensor],
    *,
    kv_tokens: int,
    precision: Precision = "bf16",
    device: str = "cpu",
    threads: int | None = None,
    deterministic: bool = False,
    native: bool = True,
) -> Runner:
    """The fastest runner that this machine has.

    weights: by transformers' names (`GPT.state_dict()`); each is asked for once, so a mapping that reads them from a
    file as they are asked for needs no room for all.  kv_tokens: size of the cache, rounded down to whole blocks.
    precision: how the weights are stored. Where a CPU cannot multiply bf16 itself, the native kernel widens weights as
    it reads them and torch keeps the rounded ones in fp32; 'int8' is for CPUs.
    threads: of the CPU; None: as many as torch has.  deterministic: a reply's tokens do not depend on what else is in
    the batch (free in the native kernel, dear in torch's, not to be had on a GPU).  native: False keeps the C++ kernel
    out.
    ValueError names a setting that cannot be, or a weight that does not fit.
    """
    if kv_tokens < BLOCK:
        raise ValueError(f"kv_tokens is {kv_tokens}; the smallest cache is one block of {BLOCK} tokens")
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; use 1 or more")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; use 1 or more, or None for as many as torch has")
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; use 'fp32', 'bf16' or 'int8'")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; use 'cpu' or 'cuda'")
    blocks = kv_tokens // BLOCK
    fitting = _Fitting(config, vocab_size, weights)
    if kind == "cuda":
        if deterministic:
            raise ValueError(
                f"deterministic is True, which device {device!r} cannot keep: its sums depend on the batch"
            )
        from nanochat.engine.cuda import CudaRunner  # imported where used: each needs what not every machine has

        return CudaRunner(config, vocab_size, fitting, precision=precision, blocks=blocks, device=device)
    threads = threads or torch.get_num_threads()
    if native:
        from nanochat.cpp import NoCompilerError
        from nanochat.engine.native import NativeRunner

        try:
            return NativeRunner(config, vocab_size, fitting, precision=precision, blocks=blocks, threads=threads)
        except NoCompilerError as fault:
            log.warning(
                "Serving without the native kernel: torch's are several times slower (7 to 10 at depth 6): %s",
                fault,
            )
    from nanochat.engine.torch_runner import TorchRunner

    torch.set_num_threads(threads)
    return TorchRunner(config, vocab_size, fitting, precision=precision, blocks=blocks, deterministic=deterministic)


class _Fitting(Mapping[str, Tensor]):
    """Weights, each checked against the model's sizes when it is asked for."""

    def __init__(self, config: ModelConfig, vocab_size: int, weights: Mapping[str, Tensor]) -> None:
        self._weights, self._shapes = weights, weight_shapes(config, vocab_size)

    def __getitem__(self, name: str) -> Tensor:
        weight, shape = self._weights[name], self._shapes[name]
        if weight.shape != shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}; this model needs {shape}")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
