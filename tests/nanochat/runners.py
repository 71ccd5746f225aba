"""Runners to test the engine with: one as one would explain it, one that computes nothing, and the rules of a batch."""

import numpy as np
import torch
from torch import Tensor

from nanochat.engine.runner import BLOCK, Batch, Precision
from nanochat.model import GPT


class Blocks:
    """The keys of one sequence, for `GPT.forward`: read from blocks and written to them one token at a time."""

    def __init__(self, cache: Tensor, table: list[int], start: int) -> None:
        self._cache, self._table, self.start = cache, table, start

    def extend(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        end = self.start + k.shape[2]
        for place in range(self.start, end):
            slot = self._cache[layer, self._table[place // BLOCK], place % BLOCK]  # (2, K, D)
            slot[0], slot[1] = k[0, :, place - self.start], v[0, :, place - self.start]
        blocks = self._cache[layer, self._table].flatten(0, 1)[:end]  # (S, 2, K, D)
        return blocks[None, :, 0].transpose(1, 2), blocks[None, :, 1].transpose(1, 2)

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        return torch.ones(tokens, self.start + tokens, dtype=torch.bool).tril_(self.start)


class PlainRunner:
    """Each sequence alone through the model, its keys gathered block by block. Slow; fp32."""

    precision: Precision = "fp32"
    deterministic = True
    weight_bytes = 0

    def __init__(self, model: GPT, blocks: int) -> None:
        self.config, self.vocab_size, self.blocks = model.config, model.vocab_size, blocks
        self._model = model
        shape = (model.config.depth, blocks, BLOCK, 2, model.config.key_heads, model.config.head_dim)
        self._cache = torch.full(shape, torch.nan)  # whoever reads a key that nobody wrote gets no reply
        self.block_bytes = self._cache[:, 0].nbytes

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        check(batch, self.blocks, self.config.context)
        hidden, at = [], 0
        for count, past, table in zip(batch.counts.tolist(), batch.past.tolist(), batch.tables.tolist(), strict=True):
            tokens = torch.from_numpy(batch.tokens[at : at + count].astype(np.int64))[None]
            hidden.append(self._model(tokens, Blocks(self._cache, table[: -(-(past + count) // BLOCK)], past))[0])
            at += count
        wanted = torch.from_numpy(batch.wanted.astype(np.int64))
        return torch.cat([self._model.logits(row[None]) for row in torch.cat(hidden)[wanted]] or [torch.empty(0, 1)])

    def copy(self, source: int, target: int) -> None:
        assert source != target
        self._cache[:, target] = self._cache[:, source]


class NullRunner:
    """Computes nothing: every row's likeliest token is `token`. Counts what it is asked."""

    precision: Precision = "fp32"
    deterministic = True
    block_bytes = weight_bytes = 0

    def __init__(self, config: object, vocab_size: int, blocks: int, token: int = 1) -> None:
        self.config, self.vocab_size, self.blocks = config, vocab_size, blocks
        self.steps: list[Batch] = []
        self.copies: list[tuple[int, int]] = []
        self._row = torch.zeros(vocab_size)
        self._row[token] = 1.0

    def forward(self, batch: Batch) -> Tensor:
        check(batch, self.blocks, self.config.context)
        self.steps.append(batch)
        return self._row.expand(len(batch.wanted), -1)

    def copy(self, source: int, target: int) -> None:
        self.copies.append((source, target))


def check(batch: Batch, blocks: int, context: int) -> None:
    """What runner.py promises a runner."""
    for part in (batch.tokens, batch.counts, batch.past, batch.tables, batch.wanted):
        assert part.dtype == np.int32
        assert part.flags.c_contiguous
    assert len(batch.counts) == len(batch.past) == len(batch.tables)
    assert batch.counts.min() >= 1
    assert batch.counts.sum() == len(batch.tokens)
    assert (batch.past + batch.counts).max() <= context
    assert batch.tables.min() >= 0
    assert batch.tables.max() < blocks
    assert (np.diff(batch.wanted) > 0).all()
    assert batch.wanted.max(initial=0) < len(batch.tokens)
    written: list[int] = []
    read: list[int] = []
    for count, past, table in zip(batch.counts.tolist(), batch.past.tolist(), batch.tables.tolist(), strict=True):
        end = -(-(past + count) // BLOCK)
        written += table[past // BLOCK : end]
        read += table[: past // BLOCK]
    assert len(written) == len(set(written)), "two sequences write to one block"
    assert not set(written) & set(read), "a block is written that another sequence reads"
