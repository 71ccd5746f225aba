"""Attention of one new token a sequence over keys that lie in blocks, in Triton.

torch's own kernels cannot: varlen_attn knows no block table before torch 2.12, and then only with pages of 256 tokens
or with FlashAttention 3 installed; a gather of all keys would move every one of them three times. A sequence's keys
are divided among programs (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html), and a second
kernel joins what they found, so that a single sequence keeps a whole GPU busy. Triton comes with torch for CUDA.
"""
# ruff: noqa: N803, PLR0913 (constants and arguments of a kernel)
# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-def, no-any-return, untyped-decorator"

# N sequences, H query heads, K key heads, G = H / K, D head size, W blocks of a table, P parts of a sequence's keys

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.engine.runner import BLOCK

TILE = 64  # keys a program reads at once
ROWS = 16  # the fewest rows that a tensor core multiplies; G is filled up to it
PROGRAMS = 528  # four for each multiprocessor of an H100 or H200
PARTS = 32  # at most


def paged_attention(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """q (N, H, D), k and v (blocks, BLOCK, K, D), tables (N, W), lengths (N,), 1 or more -> (N, H, D).

    Waits for nothing, and its grid does not depend on the lengths, so that a CUDA graph may hold it.
    """
    rows, heads, size = q.shape
    key_heads = k.shape[2]
    parts = max(1, min(PARTS, PROGRAMS // (rows * key_heads), tables.shape[1] * BLOCK // TILE))
    q, y = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    group, padded = heads // key_heads, max(16, triton.next_power_of_2(size))
    found = q.new_empty((rows, key_heads, parts, group, size), dtype=torch.float32)
    scales = q.new_empty((2, rows, key_heads, parts, group), dtype=torch.float32)  # largest score, sum of chances
    if group > ROWS:
        raise ValueError(f"{group} query heads share a key head; this kernel knows at most {ROWS}")
    numbers = {"KEY_HEADS": key_heads, "GROUP": group, "SIZE": size, "PADDED": padded, "PARTS": parts}
    _part[(rows, key_heads, parts)](
        q, k, v, tables, lengths, found, scales[0], scales[1], tables.stride(0), size**-0.5,
        **numbers, ROWS=ROWS, BLOCK=BLOCK, TILE=TILE, num_warps=4,
    )  # fmt: skip
    _join[(rows, heads)](found, scales[0], scales[1], y, **numbers, num_warps=1)
    return y


@triton.jit
def _part(
    q_at, k_at, v_at, table_at, length_at, found_at, highest_at, total_at, table_stride, scale,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What one part of a sequence's keys says to the queries of one key head: softmax within the part."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(length_at + row)
    tiles = (length + TILE - 1) // TILE
    each = (tiles + PARTS - 1) // PARTS * TILE  # keys of a part
    first = part * each
    last = tl.minimum(first + each, length)
    of_group, of_size, of_tile = tl.arange(0, ROWS), tl.arange(0, PADDED), tl.arange(0, TILE)
    real = of_size < SIZE
    mine = (of_group < GROUP)[:, None] & real[None]
    q_rows = (row * KEY_HEADS + head) * GROUP + of_group
    q = tl.load(q_at + q_rows[:, None] * SIZE + of_size[None], mask=mine, other=0.0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, PADDED), tl.float32)
    for start in range(first, last, TILE):
        at = start + of_tile
        own = at < last
        block = tl.load(table_at + row * table_stride + at // BLOCK, mask=own, other=0).to(tl.int64)
        where = ((block * BLOCK + at % BLOCK) * KEY_HEADS + head) * SIZE
        there = own[:, None] & real[None]
        k = tl.load(k_at + where[:, None] + of_size[None], mask=there, other=0.0)  # (TILE, PADDED)
        v = tl.load(v_at + where[:, None] + of_size[None], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(own[None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        fade = tl.exp(highest - higher)
        chances = tl.exp(scores - higher[:, None])
        total = total * fade + tl.sum(chances, 1)
        found = found * fade[:, None] + tl.dot(chances.to(v.dtype), v, input_precision="ieee")
        highest = higher
    to = ((row * KEY_HEADS + head) * PARTS + part) * GROUP + of_group
    tl.store(highest_at + to, highest, mask=of_group < GROUP)
    tl.store(total_at + to, total, mask=of_group < GROUP)
    tl.store(found_at + to[:, None] * SIZE + of_size[None], found, mask=mine)


@triton.jit
def _join(
    found_at, highest_at, total_at, y_at,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query's softmax over all parts. A part without keys has the highest score -inf and counts nothing."""
    row, query = tl.program_id(0), tl.program_id(1)
    of_size = tl.arange(0, PADDED)
    real = of_size < SIZE
    first = (row * KEY_HEADS + query // GROUP) * PARTS * GROUP + query % GROUP
    highest = tl.load(highest_at + first)  # the first part always has keys
    for part in range(1, PARTS):
        highest = tl.maximum(highest, tl.load(highest_at + first + part * GROUP))
    total = 0.0
    y = tl.zeros((PADDED,), tl.float32)
    for part in range(PARTS):
        at = first + part * GROUP
        share = tl.exp(tl.load(highest_at + at) - highest)
        total += tl.load(total_at + at) * share
        y += tl.load(found_at + at * SIZE + of_size, mask=real, other=0.0) * share
    to = y_at + (row * KEY_HEADS * GROUP + query) * SIZE + of_size
    tl.store(to, (y / total).to(y_at.dtype.element_ty), mask=real)
