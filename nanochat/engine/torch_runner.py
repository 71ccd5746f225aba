"""The runner for CPUs without a C++ compiler: torch's kernels over packed weights, and attention in fp32.

The residual stream, the cache and attention are fp32 whatever the weights are: at one query torch's bf16 attention
takes 2.6 to 5 times as long as its fp32 one. Weights lie as oneDNN packs them, where torch has it: read from memory
a packed fp32 matrix takes a third of the time (MKL on AMD).
"""

# T tokens, R wanted rows, H query heads, K key heads, G = H / K, D head size, S keys of a sequence

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.config import ModelConfig
from nanochat.engine.layers import Matrix, Network, load
from nanochat.engine.quantize import quantize
from nanochat.engine.runner import BLOCK, Batch, Precision
from nanochat.machine import cpu_has_bf16

TILE = 16  # rows of every product of a deterministic runner


class TorchRunner:
    """Forward passes by torch's CPU kernels.

    deterministic: every product has TILE rows and attention one query, so that which kernel torch picks, and in which
    order that sums, does not depend on what else is in the batch or on how a prompt was cut.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        weights: Mapping[str, Tensor],
        *,
        precision: Precision,
        blocks: int,
        deterministic: bool = False,
    ) -> None:
        self.config, self.vocab_size, self.precision, self.blocks = config, vocab_size, precision, blocks
        self.deterministic = deterministic
        self.weight_bytes = 0
        self._network: Network = load(
            config, weights, self._pack, torch.float32 if precision == "fp32" else torch.bfloat16
        )
        shape = (config.depth, blocks, BLOCK, config.key_heads, config.head_dim)
        self._k, self._v = torch.zeros(shape), torch.zeros(shape)
        self.block_bytes = 2 * self._k.nbytes // blocks

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        places = Places(batch)
        attention = _Attend(self._k, self._v, places, one_by_one=self.deterministic)
        hidden = self._network.hidden(torch.from_numpy(batch.tokens).long(), places.positions, attention)
        return self._network.logits(hidden[torch.from_numpy(batch.wanted).long()])

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        self._k[:, target] = self._k[:, source]
        self._v[:, target] = self._v[:, source]

    def _pack(self, weight: Tensor) -> Matrix:
        matrix, size = pack(weight, self.precision)
        self.weight_bytes += size
        return _tiled(matrix) if self.deterministic else matrix


def _tiled(matrix: Matrix) -> Matrix:
    """The same product, TILE rows at a time."""

    def product(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, -len(x) % TILE))
        return torch.cat([matrix(tile) for tile in torch.split(padded, TILE)])[: len(x)]

    return product


def pack(weight: Tensor, precision: Precision) -> tuple[Matrix, int]:
    """A product with `weight` (out, in), from fp32 to fp32, and the bytes that it reads.

    bf16 on a processor that cannot multiply it: the weights are rounded to bf16 and kept in fp32, which reads twice
    as much and still takes less time than torch's emulation.
    """
    weight = weight.detach().float()
    if precision == "int8":
        return _int8(weight)
    if precision == "bf16":
        weight = weight.bfloat16()
        if not cpu_has_bf16():
            weight = weight.float()
    dtype = weight.dtype
    if _onednn_with("avx2"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)

        def product(x: Tensor) -> Tensor:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, None, "none", [], "")
            return y.float()
    else:
        kept = weight.clone()

        def product(x: Tensor) -> Tensor:
            return F.linear(x.to(dtype), kept).float()

    return product, weight.nbytes


def _has(*names: str) -> bool:
    """Whether the processor has one of these instruction sets."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in names)


def _onednn_with(*names: str) -> bool:
    return bool(torch.backends.mkldnn.is_available()) and _has(*names)  # type: ignore[no-untyped-call]


def _int8(weight: Tensor) -> tuple[Matrix, int]:
    """Weights to 8 bits by output channel and activations by row, both symmetric; sums of whole numbers are exact.

    A processor without VNNI adds pairs of products in 16 bits, which overflow; there the activations stay fp32.
    """
    rounded, scale = quantize(weight)
    size = rounded.nbytes + scale.nbytes
    if not _onednn_with("avx512_vnni", "avx_vnni"):
        return lambda x: torch._weight_int8pack_mm(x.contiguous(), rounded, scale), size
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    zeros = torch.zeros(len(scale), dtype=torch.int64)

    def product(x: Tensor) -> Tensor:
        of_row = x.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        # 128 is added because oneDNN is fast with unsigned activations only (51 ms instead of 0.14 at 3,072 x 768).
        low = (x / of_row).round_().add_(128).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            low, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(of_row)

    return product, size


@dataclass(frozen=True, slots=True)
class Reach:
    """A sequence of a batch: its rows, and its keys."""

    row: int  # the first
    count: int  # new tokens
    slots: Tensor  # (S,) of all its keys, the new ones included
    runs: list[tuple[int, int]]  # the same as first slot and one past the last, wherever slots lie side by side


class Places:
    """Where the tokens of a batch stand, and where keys lie. A slot is the room of one token in the cache."""

    def __init__(self, batch: Batch, device: torch.device | str = "cpu") -> None:
        owner = np.repeat(np.arange(len(batch.counts)), batch.counts)  # (T,) sequence of each token
        first = np.cumsum(batch.counts) - batch.counts  # (N,) row of its first token
        at = np.arange(len(batch.tokens)) - (first - batch.past)[owner]  # (T,) position of each token
        slots = batch.tables[owner, at // BLOCK].astype(np.int64) * BLOCK + at % BLOCK
        self.positions = torch.from_numpy(at).to(device)  # (T,)
        self.slots = torch.from_numpy(slots).to(device)  # (T,) to which the new keys go
        self.sequences: list[Reach] = []
        for row, count, past, table in zip(first, batch.counts, batch.past, batch.tables, strict=True):
            length = int(past + count)
            blocks = table[: -(-length // BLOCK)].astype(np.int64)
            every = torch.from_numpy((blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()[:length]).to(device)
            breaks = (np.flatnonzero(np.diff(blocks) != 1) + 1).tolist()
            runs = [
                (int(blocks[begin]) * BLOCK, int(blocks[begin]) * BLOCK + min(end * BLOCK, length) - begin * BLOCK)
                for begin, end in zip([0, *breaks], [*breaks, len(blocks)], strict=True)
            ]
            self.sequences.append(Reach(int(row), int(count), every, runs))


class _Attend:
    """Attention of one forward pass: writes the new keys, then each sequence reads its own blocks.

    Only a sequence's own keys are read, never the rest of its last block: what lies there may be another's, and not
    finite.
    """

    def __init__(self, k: Tensor, v: Tensor, places: Places, *, one_by_one: bool) -> None:
        self._k, self._v, self._places = k, v, places  # (depth, blocks, BLOCK, K, D)
        self._one_by_one = one_by_one

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        keys, values = self._k[layer].flatten(0, 1), self._v[layer].flatten(0, 1)  # (blocks * BLOCK, K, D)
        keys.index_copy_(0, self._places.slots, k)
        values.index_copy_(0, self._places.slots, v)
        y = torch.empty_like(q)
        for one in self._places.sequences:
            if one.count == 1 and not self._one_by_one:
                y[one.row] = attend_in_place(q[one.row], keys, values, one.runs)
                continue
            own_k = keys.index_select(0, one.slots).transpose(0, 1)  # (K, S, D)
            own_v = values.index_select(0, one.slots).transpose(0, 1)
            step = 1 if self._one_by_one else one.count
            for begin in range(0, one.count, step):
                part = slice(one.row + begin, one.row + begin + step)
                end = len(one.slots) - one.count + begin + step
                y[part] = attend(q[part], own_k[:, :end], own_v[:, :end])
        return y


def attend_in_place(q: Tensor, keys: Tensor, values: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """q (H, D) of the last position, keys and values (slots, K, D) -> (H, D).

    Gathering the keys would take three times as long as reading them where they lie. Sums depend on the runs.
    """
    key_heads, size = keys.shape[1:]
    folded = q.view(key_heads, -1, size)  # (K, G, D)
    scores = [torch.bmm(folded, keys[begin:end].permute(1, 2, 0)) for begin, end in runs]  # each (K, G, keys)
    chances = torch.cat(scores, dim=-1).mul_(size**-0.5).softmax(dim=-1)
    parts = torch.split(chances, [end - begin for begin, end in runs], dim=-1)
    y = torch.zeros_like(folded)
    for (begin, end), part in zip(runs, parts, strict=True):
        y.baddbmm_(part, values[begin:end].transpose(0, 1))
    return y.view(-1, size)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (T, H, D) of the last T of S positions, k and v (K, S, D) -> (T, H, D).

    The G query heads of a key head are so many more queries to it: nothing is repeated.
    """
    tokens, heads, size = q.shape
    key_heads, keys = k.shape[:2]
    folded = q.reshape(tokens, key_heads, -1, size).permute(1, 2, 0, 3).reshape(1, key_heads, -1, size)  # G * T rows
    mask = None
    if tokens > 1:
        seen = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril_(keys - tokens)
        mask = seen.repeat(heads // key_heads, 1)  # (G * T, S)
    y = F.scaled_dot_product_attention(folded, k[None], v[None], attn_mask=mask)
    return y.view(key_heads, -1, tokens, size).permute(2, 0, 1, 3).reshape(tokens, heads, size)
