"""Attention over keys that lie in the rows themselves: training, and scoring whole texts.

The model knows no masks: it calls `attend` and asks the keys where its tokens stand. Serving from a cache has a
forward pass of its own (nanochat/engine).
"""

# B rows, T new tokens, S keys, H query heads, K key heads (H is a multiple of K), D head size

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.products import through_fp32

SHORT = 512  # tokens of a row up to which whole matrices beat tiles on a CPU


class Keys(Protocol):
    """Where the keys of a forward pass lie."""

    @property
    def start(self) -> int:
        """Position of the first new token of each row."""

    def extend(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """New keys and values (B, K, T, D) of a layer -> all of them so far, (B, K, S, D)."""

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Which keys each of the new tokens sees, broadcastable to (B, H, T, S).

        None: those up to itself, where T = S; all of them, where there is one new token.
        """


class Rows:
    """Training: each row's keys are its own tokens, or only those of the same segment.

    segments: (B, T) integers; tokens see tokens of their own number only. None: a row is one segment.
    """

    start = 0

    def __init__(self, segments: Tensor | None = None) -> None:
        self._mask: Tensor | None = None
        if segments is not None:
            same = segments[:, None, :, None] == segments[:, None, None, :]
            self._mask = same.tril_()  # (B, 1, T, T)

    def extend(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return k, v

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        return self._mask


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Keys, layer: int) -> Tensor:
    """Softmax attention with scale D ** -0.5. q (B, T, H, D), new k and v (B, T, K, D) -> (B, T, H, D)."""
    if through_fp32(q):
        return attend(q.float(), k.float(), v.float(), keys, layer).to(q.dtype)
    tokens = q.shape[1]
    all_k, all_v = keys.extend(k.transpose(1, 2), v.transpose(1, 2), layer)
    mask = keys.mask(tokens, q.device)
    if mask is None and q.requires_grad and q.device.type == "cpu" and tokens == all_k.shape[2] <= SHORT:
        return _ShortRows.apply(q, all_k, all_v)  # type: ignore[no-untyped-call, no-any-return]
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # Flash attention takes no mask and no fp32, and torch's other CUDA kernel no shared key heads: left as they
        # are, torch would keep B * H * T * S scores of every layer for the backward pass.
        group = q.shape[2] // k.shape[2]
        all_k, all_v = all_k.repeat_interleave(group, dim=1), all_v.repeat_interleave(group, dim=1)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        all_k,
        all_v,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        enable_gqa=q.shape[2] != all_k.shape[1],
    )
    return y.transpose(1, 2)


class _ShortRows(torch.autograd.Function):
    """Causal attention as whole matrices, for training on a CPU.

    torch's tiled kernel multiplies small pieces there: at 256 tokens and head size 64, forward and backward take 25 ms
    in it and 14 ms here (bf16, 24 heads, one Zen 5 core), and a training step 13% less. It keeps T * T numbers a head.
    The query heads that share a key head are one longer matrix of queries.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, tokens, heads, size = q.shape
        key_heads = k.shape[1]
        folded = _fold(q, key_heads)  # (B K, G T, D), where G query heads share one of keys
        k, v = k.reshape(-1, tokens, size), v.reshape(-1, tokens, size)
        later = torch.full((tokens, tokens), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
        scores = torch.baddbmm(later.repeat(heads // key_heads, 1), folded, k.mT, alpha=size**-0.5)
        chances = torch.softmax(scores, dim=-1, out=scores)  # (B K, G T, T)
        ctx.save_for_backward(folded, k, v, chances)
        ctx.shape = rows, key_heads
        return _unfold(torch.bmm(chances, v), rows, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, chances = ctx.saved_tensors
        rows, key_heads = ctx.shape
        scale = k.shape[-1] ** -0.5
        d_y = _fold(grads[0], key_heads)
        d_scores = torch.bmm(d_y, v.mT)  # of the chances first, then through the softmax
        d_scores = torch.ops.aten._softmax_backward_data(d_scores, chances, -1, chances.dtype)
        d_q = torch.bmm(d_scores, k).mul_(scale)
        d_k = torch.bmm(d_scores.mT, q).mul_(scale)
        d_v = torch.bmm(chances.mT, d_y)
        tokens = k.shape[1]
        per_row = (rows, key_heads, tokens, k.shape[-1])
        return _unfold(d_q, rows, tokens), d_k.view(per_row), d_v.view(per_row)


def _fold(x: Tensor, key_heads: int) -> Tensor:
    """(B, T, H, D) -> (B K, G T, D): the G = H / K query heads of a key head one below the other."""
    tokens, size = x.shape[1], x.shape[3]
    return x.transpose(1, 2).reshape(x.shape[0] * key_heads, x.shape[2] // key_heads * tokens, size)


def _unfold(x: Tensor, rows: int, tokens: int) -> Tensor:
    """(B K, G T, D) -> (B, T, H, D)."""
    return x.view(rows, -1, tokens, x.shape[-1]).transpose(1, 2)
