"""Batches for a Runner, made from what is known of each sequence, as an engine would."""

from collections.abc import Sequence

import numpy as np
import torch

from nanochat.engine.runner import BLOCK, Batch, Runner


def batch_of(parts: Sequence[tuple[Sequence[int], int, Sequence[int]]], wanted: Sequence[int] | None = None) -> Batch:
    """Each part: new tokens of a sequence, tokens before them, its blocks. wanted: None means all rows."""
    tokens = [token for new, _, _ in parts for token in new]
    width = max(len(blocks) for _, _, blocks in parts)
    return Batch(
        tokens=ints(tokens),
        counts=ints([len(new) for new, _, _ in parts]),
        past=ints([past for _, past, _ in parts]),
        tables=ints([[*blocks, *[0] * (width - len(blocks))] for _, _, blocks in parts]),
        wanted=ints(range(len(tokens)) if wanted is None else wanted),
    )


def ints(numbers: Sequence[int] | Sequence[Sequence[int]] | range) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int32)


def logits_in_pieces(
    runner: Runner, texts: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits of every token of each text, (T, V). Step i computes each text's tokens up to cuts[text][i], if any.

    tables: blocks of each text, enough for all of it.
    """
    done = [0] * len(texts)
    got: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in range(max(len(cut) for cut in cuts)):
        parts, owners = [], []
        for n, text in enumerate(texts):
            end = cuts[n][step] if step < len(cuts[n]) else done[n]
            if end > done[n]:
                parts.append((text[done[n] : end], done[n], tables[n][: -(-end // BLOCK)]))
                owners.append(n)
                done[n] = end
        if not parts:
            continue
        rows = runner.forward(batch_of(parts)).cpu().split([len(new) for new, _, _ in parts])
        for n, piece in zip(owners, rows, strict=True):
            got[n].append(piece.clone())
    return [torch.cat(pieces) for pieces in got]
