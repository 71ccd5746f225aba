"""The same training the way nanochat does it: one compiled graph from tokens to loss, all logits, a compiled optimizer.

From nanochat at commit 92d63d4 (https://github.com/karpathy/nanochat): fp32 weights cast at use, torch.compile with
static shapes, `F.scaled_dot_product_attention`, logits in fp32 as a whole, Muon on the stacked matrices of one shape.
The model, the coefficients of Muon, the schedule and the clipping are ours, so that both compute the same losses.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.config import OptimConfig
from nanochat.data import Batch
from nanochat.loss import soft_cap
from nanochat.model import EPS, GPT, Block, rotary_table, rotate
from nanochat.optim import BETAS, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, RATE_WIDTH, gradient_of
from nanochat.optim import EPS as ADAM_EPS
from nanochat.schedule import momentum, rate

Compiled = Callable[..., Any]


class Baseline:
    """Trains `model` (whose weights it moves) for `steps`."""

    def __init__(self, model: GPT, optim: OptimConfig, steps: int) -> None:
        self._model, self._optim, self._steps = model, optim, steps
        config = model.config
        self._angles = [table.to(model.device, model.dtype) for table in rotary_table(config.context, config.head_dim)]
        self._loss: Compiled = torch.compile(loss_of, dynamic=False)
        self._muon = _Muon(model, optim)
        ends = (model.model.embed_tokens.weight, model.lm_head.weight)
        factor = (model.config.width / RATE_WIDTH) ** -0.5
        self._rates = [optim.embed_lr * factor, optim.head_lr * factor]
        groups = [{"params": [weight], "lr": rate} for weight, rate in zip(ends, self._rates, strict=True)]
        self._adamw = torch.optim.AdamW(groups, betas=BETAS, eps=ADAM_EPS, weight_decay=optim.weight_decay, fused=True)

    def step(self, number: int, batches: list[Batch]) -> float:
        """Step `number` (0-based) on micro-batches of one size; returns the loss before it."""
        device = self._model.device
        losses = []
        for batch in batches:
            pair = batch.tokens.to(device), batch.targets.to(device)
            loss = self._loss(self._model, *self._angles, *pair) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._optim.clip)
        scale = rate(number, self._steps, self._optim)
        for group, full in zip(self._adamw.param_groups, self._rates, strict=True):
            group["lr"] = full * scale
        self._adamw.step()
        self._muon.step(scale, number)
        self._model.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())


def loss_of(model: GPT, cos: Tensor, sin: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cost of the targets of rows as long as the context, by way of all logits."""
    x = _norm(model.model.embed_tokens(tokens).to(model.dtype))
    for block in model.model.layers:
        x = _block(block, x, cos, sin)  # type: ignore[arg-type]
    logits = soft_cap(model.lm_head(_norm(x)).float())
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)


def _block(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    own, normed = block.self_attn, _norm(x)
    shape = (*x.shape[:2], -1, own.head_dim)
    q = _norm(rotate(own.q_proj(normed).view(shape), cos, sin)).transpose(1, 2)
    k = _norm(rotate(own.k_proj(normed).view(shape), cos, sin)).transpose(1, 2)
    v = own.v_proj(normed).view(shape).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    x = x + own.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))
    hidden = F.relu(block.mlp.fc1(_norm(x))).square()
    result: Tensor = x + block.mlp.fc2(hidden)
    return result


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class _Muon:
    def __init__(self, model: GPT, config: OptimConfig) -> None:
        self._config = config
        self._groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for name, weight in model.named_parameters():
            if name.startswith("model.layers."):
                self._groups.setdefault(weight.shape, []).append(weight)
        self._averages = {
            shape: torch.zeros((len(group), *shape), device=model.device) for shape, group in self._groups.items()
        }
        self._dtype = model.dtype
        self._step: Compiled = torch.compile(_muon_step, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self, scale: float, number: int) -> None:
        lr = torch.tensor(self._config.matrix_lr * scale)
        beta, decay = torch.tensor(momentum(number, self._config)), torch.tensor(self._config.weight_decay)
        for shape, group in self._groups.items():
            stacked = torch.stack(list(group))
            gradients = torch.stack([gradient_of(weight) for weight in group])
            size = math.sqrt(max(1.0, shape[0] / shape[1]))
            self._step(gradients, stacked, self._averages[shape], beta, lr, lr * size, decay, self._dtype)
            torch._foreach_copy_([*group], list(stacked.unbind(0)))


def _muon_step(  # noqa: PLR0913 (all that changes must be an argument of the compiled graph)
    gradients: Tensor,
    weights: Tensor,
    averages: Tensor,
    beta: Tensor,
    lr: Tensor,
    matrix_lr: Tensor,
    decay: Tensor,
    dtype: torch.dtype,
) -> None:
    """In place."""
    averages.lerp_(gradients, 1 - beta)
    x = gradients.lerp(averages, beta).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    weights.mul_(1 - lr * decay).sub_(matrix_lr * x.to(weights.dtype))
