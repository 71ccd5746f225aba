"""AdamW against torch's, Muon against a singular value decomposition and a plain loop."""

import math

import numpy as np
import pytest
import torch

from nanochat.config import OptimConfig
from nanochat.model import GPT, weight_shapes
from nanochat.optim import OPTIMIZERS, build_optimizer, merged, orthogonal, share
from nanochat.parallel import Ranks
from tests.nanochat.ranks import kept_bytes
from tests.nanochat.sizes import VOCAB, filled, small
from tests.reference.optim import SlowMuon
from tests.reference.state import state_bytes

FACTOR = (32 / 768) ** -0.5  # of embed_lr and head_lr at width 32


def give_gradients(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_adamw_is_torchs() -> None:
    config = OptimConfig(name="adamw", matrix_lr=0.003, embed_lr=0.01, head_lr=0.002, weight_decay=0.1)
    ours, theirs = filled(small(2)), filled(small(2))
    optimizer = build_optimizer(ours, config, "fp32")
    rates = {"model.embed_tokens.weight": 0.01 * FACTOR, "lm_head.weight": 0.002 * FACTOR}
    groups = [{"params": [weight], "lr": rates.get(name, 0.003)} for name, weight in theirs.named_parameters()]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1, foreach=False, fused=False)
    full = [group["lr"] for group in reference.param_groups]
    for step, scale in enumerate([0.5, 1.0, 1.0, 0.3, 0.1]):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for group, rate in zip(reference.param_groups, full, strict=True):
            group["lr"] = rate * scale
        optimizer.step(scale)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_muon_moves_ends_by_adamw_and_matrices_by_itself() -> None:
    config = OptimConfig(embed_lr=0.01, head_lr=0.002)
    muon, adamw, before = filled(small()), filled(small()), filled(small())
    for model, name in ((muon, "muon"), (adamw, "adamw")):
        give_gradients(model, 1)
        OPTIMIZERS_OF[name](model, config)
    for name, weight in muon.named_parameters():
        inside = name.startswith("model.layers.")
        assert torch.equal(weight, adamw.get_parameter(name)) != inside, name
        assert not torch.equal(weight, before.get_parameter(name)), name


def _step(name: str):  # type: ignore[no-untyped-def]
    def step(model: GPT, config: OptimConfig) -> None:
        changed = OptimConfig(name=name, embed_lr=config.embed_lr, head_lr=config.head_lr)  # type: ignore[arg-type]
        build_optimizer(model, changed, "fp32").step(1.0)

    return step


OPTIMIZERS_OF = {name: _step(name) for name in OPTIMIZERS}


@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_keeps_singular_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """U^T (update) V is diagonal, and its diagonal lies in the band the quintic is known for."""
    gradient = torch.randn(3, *shape, generator=torch.Generator().manual_seed(6))
    update = orthogonal(gradient.to(dtype)).double()
    u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    inner = u.mT @ update @ vt.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    off = inner - torch.diag_embed(values)
    assert float(values.min()) > 0.3  # the smallest of these are 1/1000 of the norm and not yet lifted whole
    assert float(values.median()) > 0.65
    assert float(values.max()) < 1.25
    assert float(off.abs().max()) < (1e-4 if dtype == torch.float32 else 0.1)  # bf16: 8 bits through 15 products


def test_muon_follows_the_slow_one() -> None:
    config = OptimConfig(matrix_lr=0.01, embed_lr=0.001, head_lr=0.001)
    model = filled(small(2))
    optimizer = build_optimizer(model, config, "fp32")
    slow = {name: SlowMuon(config) for name, _ in model.named_parameters() if name.startswith("model.layers.")}
    for step in range(4):
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        give_gradients(model, step)
        optimizer.step(1.0)
        for name, muon in slow.items():
            weight = model.get_parameter(name)
            assert weight.grad is not None
            exact = muon.update(weight.grad.double().numpy())
            real = (weight.detach() - before[name]).double().numpy()
            # the same directions: their inner product is the sum of the singular values over what is possible
            cosine = np.sum(real * exact) / np.linalg.norm(real) / np.linalg.norm(exact)
            assert cosine > 0.95, (name, step)
            assert np.linalg.norm(real) / np.linalg.norm(exact) == pytest.approx(0.9, abs=0.2), (name, step)


def test_muons_momentum_is_a_plain_loops() -> None:
    """With four different gradients, the running average is what a loop of floats makes of them."""
    config = OptimConfig()
    model = filled(small())
    optimizer = build_optimizer(model, config, "fp32")
    name = "model.layers.1.mlp.fc1.weight"
    slow = SlowMuon(config)
    for step in range(4):
        give_gradients(model, step)
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        slow.direction(gradient.double().numpy())
        optimizer.step(1.0)
    state = optimizer.state_dict()[f"momentum.{name}"]
    np.testing.assert_allclose(state.numpy(), slow.average, rtol=1e-5, atol=1e-6)


def test_muon_moves_by_rate_scale_and_shape() -> None:
    for precision in ("fp32", "bf16"):
        moves = []
        for scale in (1.0, 0.25):
            model, before = filled(small()), filled(small())
            give_gradients(model, 1)
            build_optimizer(model, OptimConfig(matrix_lr=0.01), precision).step(scale)
            moves.append({n: w.detach() - before.get_parameter(n).detach() for n, w in model.named_parameters()})
        tall = moves[0]["model.layers.0.mlp.fc1.weight"]  # (128, 32): singular values about 0.9 * sqrt(4) * rate
        assert float(torch.linalg.svdvals(tall.double()).mean()) == pytest.approx(0.01 * 2 * 0.9, rel=0.2)
        wide = moves[0]["model.layers.0.mlp.fc2.weight"]
        assert float(torch.linalg.svdvals(wide.double()).mean()) == pytest.approx(0.01 * 0.9, rel=0.2)
        for name, move in moves[0].items():
            torch.testing.assert_close(moves[1][name], 0.25 * move, rtol=1e-2, atol=1e-6)


def test_weight_decay_shrinks_every_weight() -> None:
    for name in OPTIMIZERS:
        kept, shrunk, first = filled(small()), filled(small()), filled(small())
        for model, decay in ((kept, 0.0), (shrunk, 0.5)):
            give_gradients(model, 2)
            build_optimizer(model, OptimConfig(name=name, weight_decay=decay), "fp32").step(1.0)  # type: ignore[arg-type]
        rates = {"model.embed_tokens.weight": 0.2 * FACTOR, "lm_head.weight": 0.004 * FACTOR}
        for key, weight in shrunk.named_parameters():
            lost = first.get_parameter(key) * rates.get(key, 0.02) * 0.5
            torch.testing.assert_close(kept.get_parameter(key) - weight, lost, rtol=1e-3, atol=1e-5, msg=key)


def test_state_goes_on_in_another_process() -> None:
    for name in OPTIMIZERS:
        config = OptimConfig(name=name)  # type: ignore[arg-type]
        whole, parts = filled(small(2)), filled(small(2))
        one, two = build_optimizer(whole, config, "fp32"), build_optimizer(parts, config, "fp32")
        for step in range(6):
            give_gradients(whole, step)
            one.step(1.0)
        for step in range(6):
            if step == 3:
                state = {key: tensor.clone() for key, tensor in two.state_dict().items()}
                two = build_optimizer(parts, config, "fp32")
                two.load_state_dict(state)
            give_gradients(parts, step)
            two.step(1.0)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_state_that_does_not_fit_is_named() -> None:
    state = build_optimizer(filled(small()), OptimConfig(), "fp32").state_dict()
    other = build_optimizer(filled(small(2)), OptimConfig(), "fp32")
    with pytest.raises(ValueError, match=r"momentum\.model\.layers\.0\.self_attn\.k_proj\.weight has shape \(32, 32\)"):
        other.load_state_dict(state)
    missing = {name: tensor for name, tensor in state.items() if name != "steps"} | {"more": torch.zeros(1)}
    with pytest.raises(ValueError, match="steps is missing; more is unknown here"):
        build_optimizer(filled(small()), OptimConfig(), "fp32").load_state_dict(missing)


def test_muon_on_a_zero_gradient_does_not_move() -> None:
    update = orthogonal(torch.zeros(1, 8, 8))
    assert not update.any()
    assert math.isfinite(float(update.sum()))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("world", [1, 2, 3, 5, 64])  # with 64 some have no matrix and no row of some weights
def test_a_whole_state_goes_into_any_number_of_parts_and_back(name: str, world: int) -> None:
    config, model = OptimConfig(name=name), filled(small(2))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    empty = build_optimizer(model, config, "fp32").state_dict()
    whole = {key: torch.rand(tensor.shape, generator=draw).to(tensor.dtype) for key, tensor in empty.items()}
    parts = []
    for rank in range(world):
        optimizer = build_optimizer(model, config, "fp32", Ranks(rank, world), shard=True)
        optimizer.load_state_dict(whole)
        parts.append(optimizer.state_dict())
    again = merged(reversed(parts))
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert sum(tensor.numel() for part in parts for tensor in part.values() if tensor.dim()) == sum(
        tensor.numel() for tensor in whole.values() if tensor.dim()
    )  # nothing is kept twice


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_what_state_takes_is_known_beforehand(name: str) -> None:
    sizes, config = small(2, depth=3), OptimConfig(name=name)  # type: ignore[arg-type]
    shapes = weight_shapes(sizes, VOCAB)
    numbers = {key: rows * columns for key, (rows, columns) in shapes.items()}
    inside = sum(size for key, size in numbers.items() if ".layers." in key)
    ends = sum(numbers.values()) - inside
    counts = 8 + 4 * (2 if name == "muon" else len(shapes))
    expected = counts + 8 * ends + (4 if name == "muon" else 8) * inside
    assert state_bytes(shapes, name) == expected
    for world in (1, 2, 4, 7):
        kept = []
        for rank in range(world):
            optimizer = build_optimizer(filled(sizes), config, "fp32", Ranks(rank, world), shard=True)
            kept.append(kept_bytes(optimizer.state_dict().values()))
            assert kept[-1] == state_bytes(shapes, name, rank, world)
        assert sum(kept) - world * counts == expected - counts
    assert build_optimizer(filled(sizes), config, "fp32", Ranks(1, 3)).state_dict().keys() == (
        build_optimizer(filled(sizes), config, "fp32").state_dict().keys()
    )  # nothing is sharded unasked


def test_shares_are_even_and_go_round() -> None:
    for count in (0, 1, 5, 24):
        for world in (1, 2, 3, 8):
            for turn in range(3):
                shares = [share(count, rank, world, turn) for rank in range(world)]
                assert sorted(n for own in shares for n in own) == list(range(count))
                assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(share(4, 2, 3, turn)) for turn in range(3)] == [2, 1, 1]


def test_parts_that_are_no_whole_are_refused() -> None:
    model = filled(small())
    optimizers = [build_optimizer(model, OptimConfig(), "fp32", Ranks(rank, 3), shard=True) for rank in range(3)]
    parts = [optimizer.state_dict() for optimizer in optimizers]
    with pytest.raises(ValueError, match=r"of exp_avg\.model\.embed_tokens\.weight the rows 20 to 39 are missing"):
        merged([parts[0], parts[2]])
    with pytest.raises(ValueError, match=r"of exp_avg\.lm_head\.weight the rows 0 to 19 are missing"):
        merged(parts[:2])
    with pytest.raises(ValueError, match=r"exp_avg\.lm_head\.weight@0 is unknown here"):
        optimizers[0].load_state_dict(parts[2])
    with pytest.raises(ValueError, match="two parts of a state differ in steps"):
        merged([parts[0], {**parts[1], "steps": torch.tensor(3)}])
