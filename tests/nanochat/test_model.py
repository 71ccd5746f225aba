"""The model against transformers, against loops in float64, and against what must not change it."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import NanoChatConfig, NanoChatForCausalLM

from nanochat.attention import Rows, attend
from nanochat.checkpoint import transformers_config
from nanochat.flops import flops_per_token, matrix_parameters, parameters
from nanochat.model import EPS, GPT, norm, rotary_table, rotate
from tests.nanochat.sizes import VOCAB, filled, small, some_tokens
from tests.reference import model as reference

KV_HEADS = [None, 2, 1]  # MHA, GQA, MQA


def logits(model: GPT, tokens: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, Rows(segments)))


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_same_logits_as_transformers(kv_heads: int | None) -> None:
    ours = filled(small(kv_heads))
    config = NanoChatConfig(**transformers_config(ours.config, VOCAB, torch.float32))
    config._attn_implementation = "sdpa"
    theirs = NanoChatForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = some_tokens(3, 100)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.std() > 1  # of logits within 15: nothing here is trivially equal
    torch.testing.assert_close(logits(ours, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_same_logits_as_loops_in_float64(kv_heads: int | None) -> None:
    model = filled(small(kv_heads))
    tokens = some_tokens(1, 24)
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    expected = reference.logits(weights, model.config, tokens[0].tolist())
    # fp32 has 24 bits and logits are up to 15: one rounding is 1e-6; sums of 128 terms and two layers add some
    np.testing.assert_allclose(logits(model, tokens)[0].numpy(), expected, rtol=0, atol=3e-5)


def test_bf16_stays_near_fp32() -> None:
    model = filled(small(2), std=0.1)
    exact = logits(model, some_tokens(2, 100))
    model.dtype = torch.bfloat16
    near = logits(model, some_tokens(2, 100))
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=0, atol=0.1)  # 8 bits: 1/256 of logits up to 3, over some roundings


def test_rotation_depends_on_relative_position_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    cos, sin = (table.double() for table in rotary_table(512, 64))

    def score(at_q: int, at_k: int) -> float:
        turned_q = rotate(q, cos[at_q : at_q + 1], sin[at_q : at_q + 1])
        return float((turned_q * rotate(k, cos[at_k : at_k + 1], sin[at_k : at_k + 1])).sum())

    for distance in (0, 1, 7, 100):
        expected = score(distance, 0)
        for shift in (1, 50, 400):
            # the table is fp32: an angle of 400 is known to 3e-5
            assert score(distance + shift, shift) == pytest.approx(expected, abs=2e-3)
    assert score(7, 0) != pytest.approx(score(0, 7), abs=0.1)  # but which comes first does matter


def test_shared_key_heads_equal_repeated_ones() -> None:
    shared, whole = filled(small(2)), filled(small())
    weights = dict(shared.state_dict())
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.view(2, 8, -1).repeat_interleave(2, dim=0).view(32, -1)
    whole.load_state_dict(weights)
    torch.testing.assert_close(logits(shared, some_tokens(2, 90)), logits(whole, some_tokens(2, 90)), rtol=0, atol=1e-5)


def test_segments_do_not_see_each_other() -> None:
    model = filled(small(2))
    tokens = some_tokens(1, 60)
    segments = torch.tensor([[0] * 25 + [1] * 20 + [2] * 15], dtype=torch.int32)
    together = logits(model, tokens, segments)[0]
    alone = [logits(model, tokens[:, a:b])[0] for a, b in ((0, 25), (25, 45), (45, 60))]
    # positions differ between the two, so this also says that only relative ones count
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [20, 600])  # the short way, and the long one
def test_attention_and_its_gradient_equal_the_formula(key_heads: int, tokens: int) -> None:
    def parts() -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(2)
        shapes = [(2, tokens, heads, 8) for heads in (4, key_heads, key_heads)]
        return [torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_() for shape in shapes]

    q, k, v = inputs = parts()
    weight = torch.randn(2, tokens, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    all_k, all_v = (x.repeat_interleave(4 // key_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, all_k) / math.sqrt(8)
    scores = scores.masked_fill(~torch.ones(tokens, tokens).tril().bool(), -math.inf)
    expected = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), all_v)
    expected.mul(weight).sum().backward()
    ours = parts()
    y = attend(*ours, Rows(), 0)
    y.mul(weight).sum().backward()
    torch.testing.assert_close(y, expected)
    for a, b in zip(ours, inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(attend(*parts(), Rows(), 0), expected)  # what evaluation takes


def test_too_many_tokens_are_refused() -> None:
    model = filled(small())
    with pytest.raises(ValueError, match="129 tokens; the model's context is 128"):
        model(some_tokens(1, 129), Rows())


def test_first_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = GPT(small(), VOCAB).reset(7).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = GPT(small(), VOCAB).reset(7).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    other = GPT(small(), VOCAB).reset(8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_first_weights_have_nanochats_sizes() -> None:
    config = small(1, context=256)
    weights = GPT(config, 4096).reset(1).state_dict()
    assert float(weights["model.embed_tokens.weight"].std()) == pytest.approx(1, rel=0.02)
    for layer in ("model.layers.0.", "model.layers.1."):
        # std = min(1, sqrt(out / in)) / sqrt(in), where in is 32; 3 standard errors of 256 or more numbers
        assert float(weights[layer + "self_attn.q_proj.weight"].std()) == pytest.approx(32**-0.5, rel=0.07)
        assert float(weights[layer + "self_attn.k_proj.weight"].std()) == pytest.approx(32**-0.5 / 2, rel=0.15)
        assert float(weights[layer + "mlp.fc1.weight"].std()) == pytest.approx(32**-0.5, rel=0.05)
        assert not weights[layer + "self_attn.o_proj.weight"].any()
        assert not weights[layer + "mlp.fc2.weight"].any()
    assert not weights["lm_head.weight"].any()


def test_norm_makes_the_mean_square_one() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) * 100
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(5))
    assert norm(torch.zeros(1, 64)).abs().max() == 0


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_parameters_are_counted_right(kv_heads: int | None) -> None:
    model = GPT(small(kv_heads), VOCAB)
    real = sum(weight.numel() for weight in model.parameters())
    assert parameters(model.config, VOCAB) == real
    assert matrix_parameters(model.config, VOCAB) == real - model.model.embed_tokens.weight.numel()
    assert flops_per_token(model.config, VOCAB) == 6 * (real - VOCAB * 32) + 12 * 2 * 32 * 128


def test_nats_and_loss_and_logits_agree() -> None:
    model = filled(small())
    tokens, targets = some_tokens(2, 50), some_tokens(2, 50, seed=1)
    targets[0, 10:20] = -1
    hidden = model(tokens, Rows())
    expected = F.cross_entropy(
        model.logits(hidden).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    ).view(2, 50)
    torch.testing.assert_close(model.nats(hidden, targets), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.loss(hidden, targets), expected.sum(), rtol=1e-5, atol=0)
    assert not model.nats(hidden, targets).requires_grad


def test_a_model_that_answered_first_can_be_trained() -> None:
    """Its rotary table follows it to another device at the first forward, and must not be bound to inference there."""
    model, tokens = filled(small(2)).to("meta"), some_tokens(2, 20).to("meta")
    with torch.inference_mode():
        model(tokens, Rows())
    model.loss(model(tokens, Rows()), tokens).backward()


def test_the_norm_for_training_has_the_value_and_gradient_of_torchs() -> None:
    generator = torch.Generator().manual_seed(5)
    x = (3 * torch.randn(4, 7, 48, generator=generator)).bfloat16()
    d_y = torch.randn(4, 7, 48, generator=generator).bfloat16()
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y = norm(ours)
    y.backward(d_y)
    wanted = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt()
    wanted.backward(d_y.double())
    assert ours.grad is not None
    assert exact.grad is not None
    # bf16 keeps 8 bits; y was rounded before backward uses it, so its gradient has two roundings
    torch.testing.assert_close(y.double(), wanted, atol=0, rtol=2**-8)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=2**-7, rtol=2**-7)
