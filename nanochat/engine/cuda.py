"""The runner for a GPU: decoding steps replayed from CUDA graphs, everything else eager.

A step that gives every sequence one token is padded to a power of two and replayed; nothing in it depends on a value
that only the GPU knows, so the CPU never waits inside. Its attention reads the blocks in place (paged.py). Steps with
prompts, or with drafts to be judged, gather their keys and attend by torch's varlen kernel.

Everything but graphs and those two kernels runs on a CPU as well (device="cpu"), which is how it is tested.
"""

# T tokens, N sequences, M = N padded, H query heads, K key heads, D head size, W blocks of a table, V vocabulary

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.config import ModelConfig
from nanochat.engine.layers import PLAIN, Matrix, compiled, load
from nanochat.engine.runner import BLOCK, Batch, Precision
from nanochat.engine.torch_runner import Places, attend

LARGEST = 512  # rows of a graph; larger steps are launched kernel by kernel, which then takes no longer
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Paged = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
log = logging.getLogger(__name__)


class CudaRunner:
    """Forward passes on a GPU, in the model's own precision: activations and cache are bf16 where the weights are.

    graphs: whether decoding is captured.  fuse: whether torch compiles what lies between the matrices.
    ValueError if it cannot compute in `precision`.
    """

    deterministic = False

    def __init__(  # noqa: PLR0913 (the last two are switched off by tests alone)
        self,
        config: ModelConfig,
        vocab_size: int,
        weights: Mapping[str, Tensor],
        *,
        precision: Precision,
        blocks: int,
        device: str = "cuda",
        graphs: bool = True,
        fuse: bool = True,
    ) -> None:
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; on a GPU use 'bf16' or 'fp32' ('int8' is for CPUs)")
        self.config, self.vocab_size, self.precision, self.blocks = config, vocab_size, precision, blocks
        self.device, self.dtype = torch.device(device), DTYPES[precision]
        self.weight_bytes = 0
        on_gpu = self.device.type == "cuda"
        self.graphs = graphs and on_gpu
        self.spare = blocks  # the block that no sequence owns
        between = compiled(config, vocab_size, self.device, self.dtype) if fuse and on_gpu else PLAIN
        self._network = load(config, weights, self._pack, self.dtype, self.dtype, self.device, between)
        # One block more than is lent out: rows that only pad a graph write there.
        shape = (config.depth, blocks + 1, BLOCK, config.key_heads, config.head_dim)
        self._k = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._v = torch.zeros_like(self._k)
        self.block_bytes = 2 * self._k.nbytes // (blocks + 1)
        self._paged = paged_kernel(config, self.dtype, self.device)
        self._decoding: dict[int, _Decoding] = {}

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        rows = len(batch.counts)
        if rows <= LARGEST and batch.counts.max() == 1:
            size = 1 << (rows - 1).bit_length()
            if size not in self._decoding:
                self._decoding[size] = _Decoding(self, size)
            logits = self._decoding[size].run(batch)
            if len(batch.wanted) == rows:
                return logits[:rows]
            return logits[torch.from_numpy(batch.wanted).long().to(self.device)]
        places = Places(batch, self.device)
        tokens = torch.from_numpy(batch.tokens).long().to(self.device)
        around = _Mixed(self._k, self._v, batch, places)
        hidden = self._network.hidden(tokens, places.positions, around)
        return self._network.logits(hidden[torch.from_numpy(batch.wanted).long().to(self.device)])

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        self._k[:, target] = self._k[:, source]
        self._v[:, target] = self._v[:, source]

    def decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, tables: Tensor) -> Tensor:
        """One token of each of M sequences, all (M,) but tables (M, W), on the device -> logits (M, V)."""
        lengths = positions + 1

        def attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            keys, values = self._k[layer], self._v[layer]
            keys.flatten(0, 1).index_copy_(0, slots, k)
            values.flatten(0, 1).index_copy_(0, slots, v)
            return self._paged(q, keys, values, tables, lengths)

        return self._network.logits(self._network.hidden(tokens, positions, attention))

    def _pack(self, weight: Tensor) -> Matrix:
        kept = weight.detach().to(self.device, self.dtype, copy=True)
        self.weight_bytes += kept.nbytes
        return lambda x: F.linear(x, kept)


class _Decoding:
    """A step of M sequences with one token each: its inputs at fixed addresses, and the graph that reads them.

    All inputs travel in one copy. The host's side is pinned, and is written again only when the last copy has ended.
    """

    def __init__(self, runner: CudaRunner, size: int) -> None:
        self._runner, self._size = runner, size
        numbers = size * (3 + runner.config.context // BLOCK)  # tokens, positions, slots, tables
        on_gpu = runner.device.type == "cuda"
        self._host = torch.zeros(numbers, dtype=torch.int64, pin_memory=on_gpu)
        self._inputs = torch.zeros(numbers, dtype=torch.int64, device=runner.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def run(self, batch: Batch) -> Tensor:
        """Logits (M, V); those of the first N rows mean something."""
        self._fill(batch)
        if not self._runner.graphs:
            return self._step()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _fill(self, batch: Batch) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        rows, spare = len(batch.tokens), self._runner.spare
        tokens, positions, slots, tables = (part.numpy() for part in self._parts(self._host))
        tokens[:rows], positions[:rows] = batch.tokens, batch.past
        blocks = batch.tables[np.arange(rows), batch.past // BLOCK].astype(np.int64)
        slots[:rows] = blocks * BLOCK + batch.past % BLOCK
        tables[:rows, : batch.tables.shape[1]] = batch.tables
        tokens[rows:] = positions[rows:] = 0
        slots[rows:] = spare * BLOCK
        tables[rows:, 0] = spare
        self._inputs.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _step(self) -> Tensor:
        return self._runner.decode(*self._parts(self._inputs))

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, positions and slots (M,), tables (M, W)."""
        size = self._size
        tokens, positions, slots = numbers[: 3 * size].view(3, size)
        return tokens, positions, slots, numbers[3 * size :].view(size, -1)

    def _capture(self) -> None:
        """The first runs compile kernels and choose algorithms, which a graph cannot hold.

        They write the same keys that the replay will write.
        """
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()


class _Mixed:
    """Attention of a step in which sequences have any number of tokens: their keys are gathered side by side."""

    def __init__(self, k: Tensor, v: Tensor, batch: Batch, places: Places) -> None:
        self._k, self._v, self._places = k, v, places
        self._flash = None
        size = k.shape[-1]
        if k.is_cuda and k.dtype == torch.bfloat16 and size % 8 == 0 and size <= 256:
            lengths = batch.past + batch.counts
            ends = [np.concatenate(([0], np.cumsum(part))).astype(np.int32) for part in (batch.counts, lengths)]
            new, known = (torch.from_numpy(end).to(k.device) for end in ends)
            self._flash = (new, known, int(batch.counts.max()), int(lengths.max()))
            self._keys = torch.cat([one.slots for one in places.sequences])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        keys, values = self._k[layer].flatten(0, 1), self._v[layer].flatten(0, 1)
        keys.index_copy_(0, self._places.slots, k)
        values.index_copy_(0, self._places.slots, v)
        if self._flash is not None:
            # What torch.nn.attention.varlen calls. That has shared key heads from torch 2.12 on only; the kernel always
            # had. Causal from the last query and the last key on.
            y: Tensor = torch.ops.aten._flash_attention_forward(
                q.contiguous(), keys[self._keys], values[self._keys], *self._flash, 0.0, True, False
            )[0]
            return y
        y = torch.empty_like(q)
        for one in self._places.sequences:
            part = slice(one.row, one.row + one.count)
            y[part] = attend(q[part], keys[one.slots].transpose(0, 1), values[one.slots].transpose(0, 1))
        return y


def paged_kernel(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Paged:
    """The Triton kernel if it runs here, else torch's operations; says so, once, on a GPU where it does not."""
    if device.type != "cuda":
        return gathered_attention
    try:
        from nanochat.engine.paged import paged_attention

        shapes = (1, config.heads), (2, BLOCK, config.key_heads), (2, BLOCK, config.key_heads)
        q, k, v = (torch.ones(*shape, config.head_dim, dtype=dtype, device=device) for shape in shapes)
        one = torch.ones(1, dtype=torch.int64, device=device)
        table = torch.ones(1, config.context // BLOCK, dtype=torch.int64, device=device)
        paged_attention(q, k, v, table, one)
        torch.cuda.synchronize(device)
    except Exception as fault:
        log.warning(
            "Decoding without the paged kernel, which reads the whole context at every token: %s: %s",
            type(fault).__name__,
            fault,
        )
        return gathered_attention
    return paged_attention


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """What paged.paged_attention computes, by torch's operations over every block of every table."""
    rows, heads, size = q.shape
    keys, values = (x[tables].flatten(1, 2).transpose(1, 2) for x in (k, v))  # (N, K, S, D)
    there = torch.arange(keys.shape[2], device=q.device) < lengths[:, None]  # (N, S)
    values = values.masked_fill(~there[:, None, :, None], 0)  # what another left there need not be finite
    scores = q.view(rows, k.shape[2], -1, size).float() @ keys.mT.float() * size**-0.5  # (N, K, G, S)
    chances = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(-1)
    y: Tensor = chances @ values.float()
    return y.to(q.dtype).view(rows, heads, size)
