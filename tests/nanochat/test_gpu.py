"""CUDA computes what the CPU computes: the model, its training, its checkpoints, its answers.

It imports torch, numpy, safetensors and pytest alone, so it runs on a bare machine that has a GPU:
    python -m pytest tests/nanochat/test_gpu.py --noconftest -c /dev/null --rootdir .

How far fp32 may differ: on a CPU it misses float64 by 3e-6 in these logits and by 1e-6 of the largest gradient, and
another device sums in another order. 1e-4 leaves room for that and none for TF32, which misses by 1e-2.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat import checkpoint
from nanochat.attention import Rows
from nanochat.config import ModelConfig, OptimConfig
from nanochat.data import Batch
from nanochat.engine.cuda import LARGEST, CudaRunner, gathered_attention, paged_kernel
from nanochat.engine.engine import Engine
from nanochat.engine.layers import PLAIN, compiled
from nanochat.engine.runner import BLOCK, Precision, make_runner
from nanochat.engine.sampler import SampleParams
from nanochat.files import Folder
from nanochat.loss import summed_nats
from nanochat.model import GPT
from nanochat.optim import Optimizer, build_optimizer
from nanochat.train import StepDone, TrainPlan, backward, flat_gradient, train
from tests.nanochat.batches import batch_of, logits_in_pieces
from tests.nanochat.ranks import Case, run
from tests.nanochat.sizes import VOCAB, filled, some_tokens
from tests.reference.generate import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; torch.cuda.is_available() is false here"),
]

DEVICE = "cuda"
CONTEXT, ROWS = 256, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIM = OptimConfig(matrix_lr=0.01, embed_lr=0.02)
WAITING = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; see `deterministic`


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Without it the backward pass of CUDA's attention adds in whatever order its blocks end."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def config(kv_heads: int | None = 2) -> ModelConfig:
    """Four query heads of 32."""
    return ModelConfig(depth=2, context=CONTEXT, head_dim=32, aspect=64, kv_heads=kv_heads)


def pair(kv_heads: int | None = 2) -> tuple[GPT, GPT]:
    """The same weights on the GPU and on the CPU."""
    return filled(config(kv_heads), std=0.1).to(DEVICE), filled(config(kv_heads), std=0.1)


def rows(chat: bool, seed: int = 0) -> Batch:
    """Random rows to learn by heart; as chats, with segments and with targets that do not count."""
    tokens = some_tokens(ROWS, CONTEXT, seed)
    targets = tokens.roll(-1, 1)
    if not chat:
        return Batch(tokens, targets)
    targets[:, ::3] = -1
    targets[0, 20:] = -1
    return Batch(tokens, targets, (torch.arange(CONTEXT) // 50).expand(ROWS, -1).int())


def halves(number: int) -> tuple[list[Batch], int]:
    """A loader of one batch, in two micro-batches."""
    whole = rows(chat=False)
    return [Batch(whole.tokens[a : a + 2], whole.targets[a : a + 2]) for a in (0, 2)], whole.targets.numel()


def learn(
    model: GPT, optimizer: Optimizer, steps: range, loader: Callable[[int], tuple[list[Batch], int]] = halves
) -> list[StepDone]:
    plan = TrainPlan(steps=steps.stop, batch_tokens=ROWS * CONTEXT, optim=OPTIM)
    return list(train(model, optimizer, loader, plan, start=steps.start))


def assert_same(on_gpu: Tensor, on_cpu: Tensor, most: float = 1e-4) -> None:
    """most: the largest difference, as a share of the largest number."""
    assert on_gpu.device.type == DEVICE
    off = (on_gpu.detach().double().cpu() - on_cpu.detach().double()).abs().max()
    assert float(off) <= most * float(on_cpu.detach().abs().max()), f"{float(off):.1e} apart"


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("chat", [False, True])
def test_logits_and_gradients_are_the_cpus(kv_heads: int | None, chat: bool) -> None:
    here, there = pair(kv_heads)
    batch = rows(chat)
    segments = None if batch.segments is None else batch.segments.to(DEVICE)
    logits = here.logits(here(batch.tokens.to(DEVICE), Rows(segments)))
    assert_same(logits, there.logits(there(batch.tokens, Rows(batch.segments))))
    losses = backward(here, batch, ROWS * CONTEXT), backward(there, batch, ROWS * CONTEXT)
    assert_same(*losses, most=1e-5)
    for (name, ours), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        assert_same(ours.grad, theirs.grad)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-7)])
def test_gradient_of_the_loss_is_that_of_float64(dtype: torch.dtype, most: float) -> None:
    draw = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(700, 64, generator=draw), torch.randn(300, 64, generator=draw)
    targets = torch.randint(300, (700,), generator=draw)
    targets[5:300] = -1
    exact = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
    summed_nats(exact[0], exact[1], targets).backward()
    low = [hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE).to(dtype).float().requires_grad_()]
    summed_nats(low[0], low[1], targets.to(DEVICE), chunk=256).backward()
    for ours, theirs in zip(low, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_same(ours.grad, theirs.grad, most)


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chat", [False, True])
def test_attention_never_keeps_whole_matrices(kv_heads: int | None, precision: str, chat: bool) -> None:
    """At a context of 2,048 and 32 rows they would fill a GPU. torch says nothing when it falls back to them."""
    model, _ = pair(kv_heads)
    model.dtype = DTYPES[precision]
    with sdpa_kernel(FUSED):  # raises where none of these can
        backward(model, rows(chat), ROWS * CONTEXT)


def test_bf16_training_learns_as_on_the_cpu() -> None:
    """On a CPU bf16 ends within 0.001 nats of fp32 at every one of these steps."""
    losses = []
    for device in (DEVICE, "cpu"):
        model = GPT(config(), VOCAB, torch.bfloat16).reset(1).to(device)
        losses.append([done.loss for done in learn(model, build_optimizer(model, OPTIM, "bf16"), range(20))])
    ours, theirs = losses
    assert ours[-1] < ours[0] - 1
    assert ours == pytest.approx(theirs, abs=0.005)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_optimizer_moves_weights_as_on_the_cpu(name: str) -> None:
    optim = OptimConfig(name=name, matrix_lr=0.01, embed_lr=0.02, weight_decay=0.1)  # type: ignore[arg-type]
    here, there = pair()
    for model in (here, there):
        optimizer = build_optimizer(model, optim, "fp32")
        draw = torch.Generator().manual_seed(1)
        for scale in (1.0, 0.5, 0.25):
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=draw).to(model.device)
            optimizer.step(scale)
    for ours, theirs, before in zip(here.parameters(), there.parameters(), pair()[1].parameters(), strict=True):
        assert_same(ours, theirs, most=1e-5)
        assert not torch.equal(theirs, before)


@WAITING
def test_a_step_does_not_wait_for_the_gpu() -> None:
    """But once, where `train` looks at loss and gradient norm."""
    model = GPT(config(), VOCAB, torch.bfloat16).reset(1).to(DEVICE)
    optimizer = build_optimizer(model, OPTIM, "bf16")
    learn(model, optimizer, range(1))  # the first step may set things up
    flat_gradient(model)
    batch = rows(chat=True)
    assert batch.segments is not None
    there = Batch(batch.tokens.to(DEVICE), batch.targets.to(DEVICE), batch.segments.to(DEVICE))
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(model, there, ROWS * CONTEXT)
        optimizer.step(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def runner(model: GPT, precision: Precision, blocks: int = 64, graphs: bool = True) -> CudaRunner:
    return CudaRunner(
        model.config, VOCAB, model.state_dict(), precision=precision, blocks=blocks, device=DEVICE, graphs=graphs
    )


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_pieces_over_a_paged_cache_equal_one_forward(kv_heads: int | None, precision: Precision, most: float) -> None:
    """Prompts in pieces, decoding alone and in company. bf16 keeps 8 bits: each of a dozen roundings moves by 0.4%."""
    _, there = pair(kv_heads)
    texts = [some_tokens(1, length, seed=length)[0].tolist() for length in (60, 200, 17)]
    cuts = [[29, 30, 43, 50, *range(51, 61)], [200], [0, *range(1, 18)]]
    tables = [[5, 9, 2, 40], list(range(10, 36, 2)), [7, 3]]
    pieces = logits_in_pieces(runner(there, precision), texts, cuts, tables)
    for text, ours in zip(texts, pieces, strict=True):
        with torch.inference_mode():
            whole = there.logits(there(torch.tensor([text]), Rows()))[0]
        off = float((ours - whole).abs().max())
        assert off <= most * float(whole.abs().max()), f"{off:.1e} apart"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 40, 100, LARGEST, LARGEST + 1])
def test_graphs_compute_what_is_launched_kernel_by_kernel(size: int, precision: Precision) -> None:
    """And again for other tokens, at other lengths, in other blocks; rows that only fill up a batch write nowhere."""
    model, _ = pair()
    model.dtype = DTYPES[precision]
    two = [runner(model, precision, blocks=2 * size, graphs=graphs) for graphs in (True, False)]
    for step in range(3):
        some = some_tokens(size, 1, seed=step)
        parts = [(some[n].tolist(), step * (1 + n % 9), [2 * size - 1 - 2 * n, 2 * n]) for n in range(size)]
        ours, theirs = (one.forward(batch_of(parts)) for one in two)
        assert_same(ours, theirs.cpu(), 1e-5 if precision == "fp32" else 2**-7)  # cuBLAS may choose other kernels
        assert bool(ours.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(10, 10, 128), (4, 2, 32), (6, 1, 8), (12, 4, 96)])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_attention_over_blocks_is_that_of_float64(
    rows: int, heads: int, key_heads: int, size: int, dtype: torch.dtype
) -> None:
    """Both the kernel and what stands in for it; lengths of 1, of a whole table, and between."""
    width, draw = 20, torch.Generator().manual_seed(rows)
    shape = (rows * width, BLOCK, key_heads, size)
    k, v = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    q = torch.randn(rows, heads, size, generator=draw).to(dtype)
    tables = torch.randperm(rows * width, generator=draw).view(rows, width)
    lengths = torch.randint(1, width * BLOCK + 1, (rows,), generator=draw)
    lengths[0], lengths[-1] = 1, width * BLOCK if rows > 1 else 1
    expected = torch.empty(rows, heads, size, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        own_k, own_v = (
            x[tables[row]].flatten(0, 1)[:length].double().repeat_interleave(heads // key_heads, 1) for x in (k, v)
        )
        scores = torch.einsum("hd,shd->hs", q[row].double(), own_k) * size**-0.5
        expected[row] = torch.einsum("hs,shd->hd", scores.softmax(-1), own_v)
    sizes = ModelConfig(depth=1, context=384, head_dim=size, aspect=heads * size, kv_heads=key_heads)
    kernel = paged_kernel(sizes, dtype, torch.device(DEVICE))
    if DEVICE == "cuda":
        assert kernel is not gathered_attention
    for attention in (kernel, gathered_attention):
        y = attention(*(x.to(DEVICE) for x in (q, k, v, tables, lengths)))
        assert_same(y, expected, 1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_pieces_compute_what_plain_ones_do(dtype: torch.dtype) -> None:
    fused = compiled(config(), VOCAB, torch.device(DEVICE), dtype)
    assert fused is not PLAIN
    draw = torch.Generator().manual_seed(1)
    for tokens in (1, 2, 3, 40):
        heads, cos, sin, x, y = (
            torch.randn(tokens, *shape, generator=draw).to(DEVICE, dtype)
            for shape in [(6, 32), (1, 16), (1, 16), (64,), (64,)]
        )
        with torch.inference_mode():
            pairs = [(fused.turn(heads, cos, sin), PLAIN.turn(heads, cos, sin)), (fused.cap(x), PLAIN.cap(x))]
            pairs += [(fused.square(x), PLAIN.square(x)), *zip(fused.add(x, y), PLAIN.add(x, y), strict=True)]
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            assert_same(ours, theirs.cpu(), 1e-5 if dtype == torch.float32 else 2**-6)


@WAITING
def test_a_step_is_handed_over_without_waiting() -> None:
    """Nothing between two replays looks at what the GPU computed."""
    here, _ = pair()
    one = runner(here, "bf16")
    parts = [([n], 3 * n, [n, 10 + n]) for n in range(5)]
    one.forward(batch_of(parts))  # the first step captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.forward(batch_of(parts))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_restored_run_goes_on_bit_for_bit(deterministic: None, tmp_path: Path) -> None:
    def begin(seed: int) -> tuple[GPT, Optimizer]:
        model = GPT(config(), VOCAB, torch.bfloat16).reset(seed).to(DEVICE)
        return model, build_optimizer(model, OPTIM, "bf16")

    def chats(number: int) -> tuple[list[Batch], int]:
        batch = rows(chat=True, seed=number)
        return [batch], int((batch.targets >= 0).sum())

    whole, optimizer = begin(1)
    learn(whole, optimizer, range(6), chats)
    broken, optimizer = begin(1)
    plan = TrainPlan(steps=6, batch_tokens=ROWS * CONTEXT, optim=OPTIM)
    steps = train(broken, optimizer, chats, plan)
    for _ in range(3):
        next(steps)
    saver = checkpoint.Saver(Folder(tmp_path), broken, optimizer)
    saver.save(3, {})
    saver.wait()
    again, optimizer = begin(2)
    checkpoint.restore(Folder(tmp_path), 3, again, optimizer)
    learn(again, optimizer, range(3, 6), chats)
    for (name, ours), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 20}])
def test_the_engine_answers_as_slow_generation_on_the_cpu(setting: dict[str, float]) -> None:
    here, there = pair()
    engine = Engine(make_runner(here.config, VOCAB, here.state_dict(), kv_tokens=400, precision="fp32", device=DEVICE))
    asked = [
        (some_tokens(1, 5 + 9 * n, seed=n)[0].tolist(), SampleParams(max_tokens=20, seed=n, **setting))  # type: ignore[arg-type]
        for n in range(4)
    ]
    ids = [engine.add(prompt, params) for prompt, params in asked]
    replies: dict[int, list[int]] = {id: [] for id in ids}
    while outputs := engine.step():
        for output in outputs:
            replies[output.id] += output.tokens
    assert [replies[id] for id in ids] == [generate(there, prompt, params) for prompt, params in asked]


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_nccl_ranks_are_two_accumulation_steps_bit_for_bit(tmp_path: Path) -> None:
    cases = [Case("one", 1, rows=4, micro=2, device="cuda"), Case("two", 2, rows=4, micro=2, device="cuda")]
    torch.multiprocessing.spawn(run, args=(cases, tmp_path), nprocs=2)
    one = load_file(tmp_path / "one-0.safetensors")
    assert one["losses"][0] != one["losses"][-1]
    for rank in range(2):
        other = load_file(tmp_path / f"two-{rank}.safetensors")
        assert not [name for name in one if not torch.equal(one[name], other[name])]
