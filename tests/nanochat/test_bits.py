"""Bits per byte by hand."""

import math

import pytest
import torch

from nanochat.attention import Rows
from nanochat.data import Batch
from nanochat.eval.bits import bits_per_byte, sum_nats
from tests.nanochat.sizes import filled, small, some_tokens


def test_by_hand() -> None:
    # three tokens with chances 1/2, 1/4 and 1/8 cost 1 + 2 + 3 bits; they spell 4 bytes
    nats = math.log(2) + math.log(4) + math.log(8)
    assert bits_per_byte(nats, 4) == pytest.approx(6 / 4)
    # a model that knows nothing of bytes pays 8 bits for each
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)


def test_sums_over_batches_leave_out_what_has_no_bytes() -> None:
    model = filled(small())
    pairs, expected, size = [], 0.0, 0
    for seed in range(3):
        tokens, targets = some_tokens(2, 20, seed=seed), some_tokens(2, 20, seed=10 + seed)
        sizes = (targets % 4).int()  # a quarter of them is special: no bytes
        targets[0, :5], sizes[0, :5] = -1, 0
        segments = torch.tensor([[1] * 8 + [2] * 12] * 2) if seed == 1 else None
        pairs.append((Batch(tokens, targets, segments), sizes))
        with torch.no_grad():
            chances = model.logits(model(tokens, Rows(segments))).double().log_softmax(-1)
        for row in range(2):
            for position in range(20):
                if sizes[row, position]:
                    expected -= float(chances[row, position, targets[row, position]])
                    size += int(sizes[row, position])
    nats, total = sum_nats(model, pairs)
    assert total == size
    assert nats == pytest.approx(expected, rel=1e-6)
