"""The C++ kernel against loops in float64, against torch, and against itself in other company."""

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.attention import Rows
from nanochat.config import ModelConfig
from nanochat.cpp import Build, NoCompilerError
from nanochat.engine.native import DEFAULT, NativeRunner, library, read_bandwidth
from nanochat.engine.quantize import quantize
from nanochat.engine.runner import BLOCK, Precision
from nanochat.model import GPT
from tests.nanochat.batches import batch_of, logits_in_pieces
from tests.nanochat.sizes import VOCAB, filled, small, some_tokens
from tests.reference import model as reference

PRECISIONS: list[Precision] = ["fp32", "bf16", "int8"]
KV_HEADS = [None, 2, 1]  # MHA, GQA, MQA
BLOCKS = 64


@pytest.fixture(scope="module", autouse=True)
def _a_compiler() -> None:
    try:
        library(DEFAULT)
    except NoCompilerError as error:
        pytest.skip(str(error))


def runner(
    model: GPT, precision: Precision, threads: int = 1, build: Build = DEFAULT, blocks: int = BLOCKS
) -> NativeRunner:
    weights = model.state_dict()
    return NativeRunner(
        model.config, model.vocab_size, weights, precision=precision, blocks=blocks, threads=threads, build=build
    )


def all_at_once(run: NativeRunner, text: Sequence[int]) -> np.ndarray:
    return logits_in_pieces(run, [text], [[len(text)]], [range(-(-len(text) // BLOCK))])[0].numpy()


def exact(model: GPT, text: Sequence[int]) -> np.ndarray:
    return reference.logits(
        {name: w.detach().numpy() for name, w in model.named_parameters()}, model.config, list(text)
    )


def text_of(count: int, seed: int = 0) -> list[int]:
    return some_tokens(1, count, seed)[0].tolist()


def wide(kv_heads: int | None = None) -> GPT:
    """Sizes of a real model's kind: heads of 64, and nothing a multiple of anything else."""
    config = ModelConfig(depth=1, context=384, head_dim=64, aspect=192, kv_heads=kv_heads)
    return filled(config, std=0.08)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_fp32_is_the_model(kv_heads: int | None) -> None:
    model, text = filled(small(kv_heads)), text_of(40)
    # fp32 has 24 bits and logits are up to 15: one rounding is 1e-6; sums of 128 terms and two layers add some
    np.testing.assert_allclose(all_at_once(runner(model, "fp32"), text), exact(model, text), rtol=0, atol=3e-5)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_fp32_is_torchs_over_many_blocks(kv_heads: int | None) -> None:
    model, text = wide(kv_heads), text_of(300)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([text]), Rows()))[0].numpy()
    assert expected.std() > 1
    np.testing.assert_allclose(all_at_once(runner(model, "fp32", 2), text), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_bf16_is_near_the_model(kv_heads: int | None) -> None:
    model, text = filled(small(kv_heads)), text_of(40)
    far = np.abs(all_at_once(runner(model, "bf16"), text) - exact(model, text))
    # 8 bits: a number is off by 1/512 on average, a sum of many by as much of its own size; logits are near 2, and
    # weights, inputs, keys and values of two layers are rounded
    assert far.mean() < 2 / 512 * 5
    assert far.max() < 15 / 512 * 5


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_int8_is_near_the_model_of_its_own_weights(kv_heads: int | None) -> None:
    model, text = filled(small(kv_heads)), text_of(40)
    run = runner(model, "int8")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.copy_(weight.bfloat16())
            else:
                whole, scale = quantize(weight)
                weight.copy_(whole * scale[:, None])
    far = np.abs(all_at_once(run, text) - exact(model, text))
    # inputs are off by 1/4 of a step on average, a step is 1/127 of the largest of 64 and that is some 2.5 times the
    # usual size: 1/200 of it; twice as many roundings count as in bf16's test
    assert far.mean() < 2 / 200 * 5
    assert far.max() < 15 / 200 * 5


def test_weights_in_bf16_are_taken_as_they_are() -> None:
    model, text = filled(small()), text_of(20)
    expected = all_at_once(runner(model, "bf16"), text)
    rounded = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    run = NativeRunner(model.config, VOCAB, rounded, precision="bf16", blocks=BLOCKS, threads=1)
    np.testing.assert_array_equal(all_at_once(run, text), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_bits_depend_on_nothing_else(precision: Precision, kv_heads: int | None) -> None:
    model = wide(kv_heads)
    texts = [text_of(n, seed) for seed, n in enumerate((150, 61, 33, 1))]
    alone = [all_at_once(runner(model, precision), text) for text in texts]
    tables = [range(10), range(30, 34), (50, 12, 49), (29,)]
    # chunks that end anywhere, rows that join and leave, tiles of every height
    cuts = [[1, 7, 40, 40, 41, 56, 70, 148, 150], [32, 33, 61], [0, 0, 16, 17, 18, 19, 32, 33], [0, 0, 0, 0, 1]]
    for threads in (1, 2, 5):
        together = logits_in_pieces(runner(model, precision, threads), texts, cuts, tables)
        for mine, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(mine.numpy(), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_number_of_rows(precision: Precision) -> None:
    model, text = wide(), text_of(1)
    run = runner(model, precision, 2)
    alone = all_at_once(run, text)[0]
    for rows in range(1, 45):
        logits = run.forward(batch_of([(text, 0, [n]) for n in range(rows)]))
        assert (logits.numpy() == alone).all(), rows


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("counts", [(50, 3, 37), (5, 3, 9)])  # sequences of several pieces of attention, and of one
def test_only_wanted_rows(precision: Precision, counts: tuple[int, ...]) -> None:
    model = filled(small(2))
    tables = (range(4), [9], range(5, 8))
    parts = [(text_of(count, count), 0, table) for count, table in zip(counts, tables, strict=True)]
    rows = sum(counts)
    run = runner(model, precision, 2)
    everything = run.forward(batch_of(parts)).clone()
    for wanted in ([], [0], [counts[0] - 1, counts[0] + 2, rows - 1], [3, 4, 5, rows - 3, rows - 2]):
        other = runner(model, precision, 2)
        assert torch.equal(other.forward(batch_of(parts, wanted)), everything[wanted])
        after = batch_of([([7], count, table) for count, table in zip(counts, tables, strict=True)])
        assert torch.equal(other.forward(after), run.forward(after)), "all keys are written, wanted or not"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_shared_blocks_and_copies(precision: Precision) -> None:
    model, text = filled(small(2)), text_of(40)
    run = runner(model, precision)
    run.forward(batch_of([(text, 0, [3, 4, 5])], []))
    run.copy(5, 11)
    both = run.forward(batch_of([([1, 2], 40, [3, 4, 5]), ([7, 8], 40, [3, 4, 11])])).numpy().copy()
    for new, got in (([1, 2], both[:2]), ([7, 8], both[2:])):
        np.testing.assert_array_equal(got, all_at_once(runner(model, precision), text + new)[40:])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_what_lies_in_a_block_does_not_leak(precision: Precision, kv_heads: int | None) -> None:
    """A row of NaN fills the cache; who gets its blocks, and who stands beside it, never notices."""
    model = filled(small(kv_heads))
    text = [t % 60 for t in text_of(45)]
    expected = all_at_once(runner(model, precision), text)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    run = runner(model, precision, blocks=8)
    bad = [60] * 128
    assert run.forward(batch_of([(bad, 0, range(8))])).isnan().all()
    parts, got = [(bad[:20], 0, range(4, 6)), (text[:9], 0, range(3)), (bad[:3], 0, [6])], []
    got.append(run.forward(batch_of(parts))[20:29].clone())
    for begin, end in pairwise((9, 10, 20, 45)):
        got.append(run.forward(batch_of([(text[begin:end], begin, range(3))])).clone())
    np.testing.assert_array_equal(torch.cat(got).numpy(), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain_code_means_the_same(precision: Precision) -> None:
    """Without a single intrinsic, for the oldest processor; sums are rounded otherwise, that is all."""
    slow = [flag.replace("-O3", "-O1") for flag in DEFAULT.flags if flag != "-march=native"]
    plain = Build(flags=(*slow, "-DNANOCHAT_PORTABLE"))
    for model in (filled(small(2)), wide()):
        text = text_of(70)
        got, expected = (all_at_once(runner(model, precision, build=build), text) for build in (plain, DEFAULT))
        # a sum that is rounded otherwise may round an input of the next matrix otherwise: fewer than in the tests above
        np.testing.assert_allclose(got, expected, rtol=0, atol={"fp32": 3e-5, "bf16": 0.1, "int8": 0.3}[precision])


def test_sizes_are_told() -> None:
    numbers = {"fp32": 4, "bf16": 2, "int8": 1}
    for precision in PRECISIONS:
        model = GPT(ModelConfig(depth=1, context=128, aspect=128), 64)
        run = runner(model, precision, blocks=1)
        matrices = sum(weight.numel() for name, weight in model.named_parameters() if "embed" not in name)
        scales = sum(len(weight) for name, weight in model.named_parameters() if "embed" not in name)
        assert run.weight_bytes == matrices * numbers[precision] + (scales * 4 if precision == "int8" else 0)
        assert run.block_bytes == 2 * 128 * BLOCK * (4 if precision == "fp32" else 2)
        assert run.deterministic
        assert (run.precision, run.vocab_size, run.blocks) == (precision, 64, 1)


def test_a_batch_that_cannot_be_is_refused() -> None:
    run = runner(filled(small()), "fp32", blocks=4)
    good = (text_of(3), 16, [0, 3])
    for bad, field in (
        (batch_of([([VOCAB], 0, [0])]), "tokens"),
        (batch_of([([-1], 0, [0])]), "tokens"),
        (dataclasses.replace(batch_of([good]), counts=np.array([2], np.int32)), "counts"),
        (batch_of([([1], 128, range(4))]), "past"),
        (batch_of([([1], -1, [0])]), "past"),
        (batch_of([(text_of(33), 0, [0, 1])]), "tables"),
        (batch_of([([1], 0, [4])]), "tables"),
        (batch_of([good], [3]), "wanted"),
        (batch_of([good], [1, 0]), "wanted"),
    ):
        with pytest.raises(AssertionError, match=f"the batch's {field} are out of range"):
            run.forward(bad)
    longer = dataclasses.replace(batch_of([good]), tokens=np.zeros(3, np.int64))
    with pytest.raises(AssertionError, match="int32"):
        run.forward(longer)


def test_quantize_is_the_nearest_whole_number() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    whole, scale = quantize(weight)
    assert whole.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert ((whole * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


# ---- threads


def run_apart(code: str) -> str:
    head = """
import os, sys
import numpy as np
from tests.nanochat.test_native import *
def threads():
    return len(os.listdir("/proc/self/task"))
model, text = filled(small()), text_of(30)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_dropped_runners_leave_no_thread() -> None:
    code = """
    before = threads()
    for _ in range(20):
        run = runner(model, "bf16", 3)
        all_at_once(run, text)
        during = threads() - before
        del run
    print(during, threads() - before)
    """
    assert run_apart(code) == "2 0\n"


def test_a_fork_has_threads_of_its_own() -> None:
    code = """
    run = runner(model, "bf16", 2)
    expected = all_at_once(run, text)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            same = (all_at_once(run, text) == expected).all()
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert (all_at_once(run, text) == expected).all()
    unused = os.fork()
    if unused == 0:
        del run
        sys.exit(0)
    print(os.waitpid(unused, 0)[1])
    """
    assert run_apart(code) == "0\n"


def test_bandwidth_is_a_speed_of_memory() -> None:
    assert 1e8 < read_bandwidth(1, 1 << 24) < 1e13
