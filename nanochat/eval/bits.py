"""Bits per byte: what a model pays to code one byte of text; comparable between vocabularies, unlike the loss."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nanochat.attention import Rows
from nanochat.data import Batch
from nanochat.model import GPT


def bits_per_byte(nats: float, size: int) -> float:
    """Bits to code one byte of text (The Pile, https://arxiv.org/abs/2101.00027).

    nats: summed over targets.  size: the UTF-8 bytes of those targets, summed. ValueError if it is 0.
    """
    if size <= 0:
        raise ValueError(f"the targets hold {size} bytes of text; there is nothing to divide by")
    return nats / (math.log(2) * size)


@torch.no_grad()
def sum_nats(model: GPT, batches: Iterable[tuple[Batch, Tensor]]) -> tuple[float, int]:
    """Nats and bytes, summed over the targets that have bytes; sum both over ranks before dividing.

    batches: pairs of Batch and sizes (B, T), the bytes of each target, 0 for a special token or one that does not
    count; those are left out of both sums.
    """
    total, size = 0.0, 0
    for batch, sizes in batches:
        segments = None if batch.segments is None else batch.segments.to(model.device)
        hidden = model(batch.tokens.to(model.device), Rows(segments))
        nats = model.nats(hidden, batch.targets.to(model.device)).cpu()
        total += float(nats[sizes > 0].double().sum())
        size += int(sizes.sum())
    return total, size
