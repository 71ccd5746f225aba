"""Every runner of a CPU against the model's own forward pass, which knows no cache, no blocks and no packing."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat.attention import Rows
from nanochat.config import ModelConfig
from nanochat.engine.cuda import CudaRunner
from nanochat.engine.runner import BLOCK, Precision, Runner, make_runner
from nanochat.engine.torch_runner import TorchRunner
from nanochat.machine import cpu_has_bf16
from nanochat.model import GPT
from tests.nanochat.batches import batch_of, logits_in_pieces
from tests.nanochat.sizes import VOCAB, filled, small, some_tokens

BLOCKS = 40


def in_torch(model: GPT, precision: Precision) -> Runner:
    return TorchRunner(model.config, VOCAB, model.state_dict(), precision=precision, blocks=BLOCKS)


def deterministic(model: GPT, precision: Precision) -> Runner:
    return TorchRunner(model.config, VOCAB, model.state_dict(), precision=precision, blocks=BLOCKS, deterministic=True)


def fastest(model: GPT, precision: Precision) -> Runner:
    return make_runner(model.config, VOCAB, model.state_dict(), kv_tokens=BLOCKS * BLOCK, precision=precision)


def for_cuda(model: GPT, precision: Precision) -> Runner:
    """What a GPU computes, here without one: no graphs and none of its kernels."""
    return CudaRunner(model.config, VOCAB, model.state_dict(), precision=precision, blocks=BLOCKS, device="cpu")


Make = Callable[[GPT, Precision], Runner]
RUNNERS = [in_torch, deterministic, fastest, for_cuda]


def whole(model: GPT, tokens: list[int]) -> Tensor:
    """(T, V)"""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens]), Rows()))[0]


def texts(*lengths: int) -> list[list[int]]:
    return [some_tokens(1, length, seed=n)[0].tolist() for n, length in enumerate(lengths)]


def disjoint(lengths: list[int]) -> list[list[int]]:
    """Blocks of each text, scattered over the cache."""
    free = list(range(BLOCKS))
    random.Random(7).shuffle(free)
    return [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]


@pytest.mark.parametrize("make", RUNNERS)
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_chunks_of_many_sequences_equal_one_forward(make: Make, kv_heads: int | None) -> None:
    """Prompts cut at and beside the borders of blocks, decoding in between, one text that starts later."""
    model = filled(small(kv_heads))
    lengths = [70, 33, 128, 20]
    some = texts(*lengths)
    cuts = [
        [16, 32, 33, 34, *range(35, 71)],
        [1, 2, 17, *range(18, 34)],
        [0, 50, 51, 127, 128],
        [0, 0, 15, 16, 17, 20],
    ]
    got = logits_in_pieces(make(model, "fp32"), some, cuts, disjoint(lengths))
    for text, ours in zip(some, got, strict=True):
        expected = whole(model, text)
        # logits up to 15 in fp32: one rounding is 1e-6; sums of up to 128 terms in two layers add some
        torch.testing.assert_close(ours, expected, rtol=0, atol=3e-5)
    assert expected.std() > 1


@pytest.mark.parametrize(
    ("make", "precision", "most"),
    [(make, "bf16", 0.02) for make in RUNNERS] + [(make, "int8", 0.04) for make in RUNNERS if make is not for_cuda],
)
def test_low_precision_stays_near_fp32(make: Make, precision: Precision, most: float) -> None:
    """Weights and activations keep 8 bits in bf16 (1/256 each time), 7 and a sign of the largest in int8.

    most: root of the mean square, as a share of the logits'. A dozen roundings of 1/256 make 1.5%; the largest of 32
    normal numbers is 2.2 times their root mean square, so int8 rounds by 2.2 / 127 / sqrt(12) = 0.5% each time.
    """
    model = filled(small(2), std=0.1)
    (text,) = texts(100)
    expected = whole(model, text)
    (got,) = logits_in_pieces(make(model, precision), [text], [[40, 41, 42, 100]], disjoint([100]))
    off = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 1e-4 < off < most  # above 1e-4: it does round


@pytest.mark.parametrize("make", RUNNERS)
def test_shared_and_copied_blocks_serve_both(make: Make) -> None:
    model = filled(small(2))
    runner = make(model, "fp32")
    stem, ends = texts(40)[0], [texts(20)[0], texts(1, 12)[1]]
    logits_in_pieces(runner, [stem], [[40]], [[5, 9, 2]])
    runner.copy(2, 30)  # the last block of the stem is half full and goes on in two ways
    tables = [[5, 9, 2, 11], [5, 9, 30, 12]]
    got = runner.forward(batch_of([(end, 40, table) for end, table in zip(ends, tables, strict=True)]))
    expected = torch.cat([whole(model, [*stem, *end])[40:] for end in ends])
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("make", RUNNERS)
def test_only_wanted_rows_come_back(make: Make) -> None:
    model = filled(small(2))
    some = texts(30, 7, 1)
    tables = disjoint([30, 7, 1])
    parts = [(text, 0, table) for text, table in zip(some, tables, strict=True)]
    every = torch.cat([whole(model, text) for text in some])
    for wanted in ([29, 36, 37], [0, 5], []):
        got = make(model, "fp32").forward(batch_of(parts, wanted))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu(), every[wanted], rtol=0, atol=3e-5)


@pytest.mark.parametrize("make", RUNNERS)
def test_tokens_that_are_taken_back_leave_no_trace(make: Make) -> None:
    """Drafts that were wrong: the right tokens are computed in their place."""
    model = filled(small(2))
    runner = make(model, "fp32")
    right, wrong = texts(44, 44)
    table = [7, 2, 30]
    runner.forward(batch_of([(right[:20], 0, table)]))
    runner.forward(batch_of([(wrong[20:40], 20, table)]))
    got = [
        runner.forward(batch_of([(new, at, table)])).cpu().clone() for new, at in ((right[20:43], 20), (right[43:], 43))
    ]
    torch.testing.assert_close(torch.cat(got), whole(model, right)[20:], rtol=0, atol=3e-5)


@pytest.mark.parametrize("make", RUNNERS)
def test_what_another_left_in_a_block_does_no_harm(make: Make) -> None:
    """Not even if it is not finite: one token's row of the embedding is broken, and its block is used again."""
    model = filled(small(2))
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = torch.nan
    runner = make(model, "fp32")
    table = [3, 8, 1]
    assert not runner.forward(batch_of([([60] * 45, 0, table)])).isfinite().any()
    text = [token % 60 for token in texts(45)[0]]
    cuts = [[5, 20, *range(21, 46)]]
    (got,) = logits_in_pieces(runner, [text], cuts, [table])
    torch.testing.assert_close(got, whole(model, text), rtol=0, atol=3e-5)
    broken = [*text[:44], 60]
    parts = [(broken, 0, table), (text, 0, [4, 5, 6])]
    got = runner.forward(batch_of(parts)).cpu()
    torch.testing.assert_close(got[45:], whole(model, text), rtol=0, atol=3e-5)  # nor in the same batch
    assert not got[44].isfinite().any()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(depth=1, context=128, head_dim=8, aspect=24, kv_heads=1),
        ModelConfig(depth=2, context=256, head_dim=64, aspect=128, kv_heads=2),
        ModelConfig(depth=1, context=128, head_dim=128, aspect=768),  # oneDNN has kernels of its own for one row here
    ],
)
def test_deterministic_logits_have_the_same_bits(precision: Precision, config: ModelConfig) -> None:
    """Whatever else is in the batch, wherever a prompt is cut, and whichever blocks it lies in."""
    model = filled(config, std=0.1)
    draw = random.Random(5)
    some = texts(60, 45, 100, 9, 31)
    alone = []
    for text in some:
        (one,) = logits_in_pieces(deterministic(model, precision), [text], [[len(text)]], disjoint([len(text)]))
        alone.append(one)
    runner = deterministic(model, precision)
    for _ in range(5):
        cuts = [[*sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 30))), len(text)] for text in some]
        together = logits_in_pieces(runner, some, cuts, disjoint([len(text) for text in some]))
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_each_weight_is_asked_for_once_and_none_is_kept() -> None:
    model = filled(small(2))
    asked: list[str] = []

    class Once(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return model.state_dict()[name]

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(model.state_dict())

        def __len__(self) -> int:
            return len(model.state_dict())

    (text,) = texts(20)
    expected = whole(model, text)
    for native in (False, True):
        asked.clear()
        runner = make_runner(model.config, VOCAB, Once(), kv_tokens=64, precision="fp32", native=native)
        assert sorted(asked) == sorted(model.state_dict())
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        got = runner.forward(batch_of([(text, 0, [0, 1])]))
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)
        model.load_state_dict(before)


@pytest.mark.parametrize("native", [False, True])
def test_sizes_are_those_of_the_weights(native: bool) -> None:
    model = filled(small(2))
    matrices = sum(weight.numel() for name, weight in model.state_dict().items() if "embed" not in name)
    rows = sum(len(weight) for name, weight in model.state_dict().items() if "embed" not in name)
    of_bf16 = 2 if native or cpu_has_bf16() else 4  # bytes: torch computes in fp32 where the processor has no bf16
    for precision, expected in (("fp32", 4 * matrices), ("bf16", of_bf16 * matrices), ("int8", matrices + 4 * rows)):
        runner = make_runner(
            model.config,
            VOCAB,
            model.state_dict(),
            kv_tokens=100,
            precision=precision,  # type: ignore[arg-type]
            native=native,
        )
        assert runner.blocks == 6  # 100 tokens, rounded down
        assert runner.precision == precision
        if native:  # rows and columns may be filled up to whole registers
            assert expected <= runner.weight_bytes
        else:
            assert runner.weight_bytes == expected
            assert runner.block_bytes == 4 * 2 * 2 * BLOCK * 2 * 8  # fp32, keys and values, layers, tokens, heads, size


def test_a_machine_without_a_compiler_is_served_by_torch_and_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = filled(small(2))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))  # where the kernel that was compiled before would be found
    runner = make_runner(model.config, VOCAB, model.state_dict(), kv_tokens=64, precision="fp32", deterministic=True)
    assert isinstance(runner, TorchRunner)
    assert runner.deterministic
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "no C++ compiler" in record.getMessage()
    assert "several times slower" in record.getMessage()
    caplog.clear()
    quiet = make_runner(model.config, VOCAB, model.state_dict(), kv_tokens=64, native=False)
    assert isinstance(quiet, TorchRunner)
    assert not caplog.records  # it was asked for


def test_sizes_that_cannot_be_are_refused() -> None:
    model = filled(small(2))

    def make(**changes: object) -> None:
        make_runner(model.config, VOCAB, model.state_dict(), **{"kv_tokens": 64, **changes})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="kv_tokens is 15; the smallest cache is one block of 16 tokens"):
        make(kv_tokens=15)
    with pytest.raises(ValueError, match="threads is 0"):
        make(threads=0)
    with pytest.raises(ValueError, match="precision is 'fp16'; use 'fp32', 'bf16' or 'int8'"):
        make(precision="fp16")
    with pytest.raises(ValueError, match="device is 'tpu'; use 'cpu' or 'cuda'"):
        make(device="tpu")
    with pytest.raises(ValueError, match="vocab_size is 0; use 1 or more"):
        make_runner(model.config, 0, model.state_dict(), kv_tokens=64)
    with pytest.raises(ValueError, match="deterministic is True, which device 'cuda' cannot keep"):
        make(device="cuda", deterministic=True)
    with pytest.raises(ValueError, match="precision is 'int8'; on a GPU use 'bf16' or 'fp32'"):
        make(device="cuda", precision="int8")
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \(61, 32\); this model needs \(62, 32\)"):
        make_runner(model.config, 62, model.state_dict(), kv_tokens=64, native=False)
