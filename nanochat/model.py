"""The GPT of nanochat's first release, weight for weight as transformers implements it (models/nanochat).

Rotary positions, RMS norm without parameters, queries and keys normed after the rotation, shared key heads, ReLU^2,
no biases, untied head, soft-capped logits. Training and scoring go through it; serving has its own forward pass over
the same weights (nanochat/engine), which is tested against this one.
"""

# B rows, T tokens, C = width, H query heads, K key heads, D head size, V vocabulary

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanochat.attention import Keys, attend
from nanochat.config import ModelConfig
from nanochat.loss import nats, soft_cap, summed_nats
from nanochat.products import linear

EPS = torch.finfo(torch.float32).eps  # of RMS norm; what F.rms_norm takes by itself for fp32 and bf16
ROPE_BASE = 10_000.0


class Linear(nn.Module):
    """x W^T. The fp32 master weight is cast to x's dtype at each use. Zero until `GPT.reset` or a load."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Module):
    """A row of `weight` for each token."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Attention(nn.Module):
    """Causal self-attention; `kv_heads` key heads are shared by the query heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = Linear(config.width, config.heads * config.head_dim)
        self.k_proj = Linear(config.width, config.key_heads * config.head_dim)
        self.v_proj = Linear(config.width, config.key_heads * config.head_dim)
        self.o_proj = Linear(config.heads * config.head_dim, config.width)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Keys) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q = norm(rotate(self.q_proj(x).view(shape), *angles))  # (B, T, H, D)
        k = norm(rotate(self.k_proj(x).view(shape), *angles))  # (B, T, K, D)
        v = self.v_proj(x).view(shape)  # (B, T, K, D)
        y: Tensor = self.o_proj(attend(q, k, v, keys, self.layer).flatten(2))
        return y


class MLP(nn.Module):
    """Four times as wide inside, ReLU squared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, 4 * config.width)
        self.fc2 = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.relu(self.fc1(x)).square())
        return y


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Keys) -> Tensor:
        x = x + self.self_attn(norm(x), angles, keys)
        y: Tensor = x + self.mlp(norm(x))
        return y


class Trunk(nn.Module):
    """Everything below the head; apart only because the parameters are named so in transformers."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.depth))


class GPT(nn.Module):
    """A language model. All weights are zero until `reset` or a load.

    dtype: of the computation (activations); may be changed at any time. Weights are cast to it at use.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.vocab_size, self.dtype = config, vocab_size, dtype
        self.model = Trunk(config, vocab_size)
        self.lm_head = Linear(config.width, vocab_size)
        # Not buffers: casting the model to bf16 would round them.
        self._cos, self._sin = rotary_table(config.context, config.head_dim)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @torch.no_grad()
    def reset(self, seed: int) -> "GPT":
        """Initial weights as nanochat's. They follow from the seed alone, whatever the device and the global state.

        A matrix has std min(1, sqrt(out / in)) / sqrt(in) (https://arxiv.org/abs/2310.17813); those that write to the
        residual stream, and the head, begin at zero, so that every block begins as the identity.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            outputs, inputs = weight.shape
            std = min(1.0, math.sqrt(outputs / inputs)) / math.sqrt(inputs)
            if name == "model.embed_tokens.weight":
                std = 1.0
            if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
                weight.zero_()
            else:
                weight.copy_(torch.empty(weight.shape).normal_(std=std, generator=generator))
        return self

    def forward(self, tokens: Tensor, keys: Keys) -> Tensor:
        """tokens (B, T) int64 -> hidden states after the last norm, (B, T, C), in `dtype`.

        ValueError if they reach beyond the context.
        """
        start, end = keys.start, keys.start + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"{end} tokens; the model's context is {self.config.context}")
        angles = self._angles(start, end, tokens.device)
        x = norm(self.model.embed_tokens(tokens).to(self.dtype))
        for block in self.model.layers:
            x = block(x, angles, keys)
        return norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), fp32, within (-15, 15)."""
        return soft_cap(self.lm_head(hidden).float())

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum, not mean, of the nats of the targets that count (those that are not -1); fp32 scalar.

        The logits are never there as a whole, so this costs memory for 1,024 positions only.
        """
        return summed_nats(hidden.flatten(0, -2), self.lm_head.weight, targets.flatten())

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """What each target costs, without a gradient; fp32 in the shape of targets, 0 where the target is -1."""
        return nats(hidden.flatten(0, -2), self.lm_head.weight, targets.flatten()).view(targets.shape)

    def _angles(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._cos.device != device:
            with torch.inference_mode(False):  # else a model that answered first could not be trained any more
                self._cos, self._sin = self._cos.to(device), self._sin.to(device)
        return self._cos[start:end].to(self.dtype), self._sin[start:end].to(self.dtype)


def weight_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by its name in transformers, without the memory for any."""
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def norm(x: Tensor) -> Tensor:
    """Root mean square 1 along the last axis; computed in fp32."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.requires_grad:
        return _Norm.apply(x)  # type: ignore[no-untyped-call, no-any-return]
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class _Norm(torch.autograd.Function):
    """The norm for training on a CPU, where torch has no kernel of its own and goes over the numbers twice as often.

    Forward and backward of (8, 512, 192) in bf16: 1.8 ms here, 3.9 ms there (two Zen 5 cores).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()  # (..., 1)
        y: Tensor = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grads[0] * y).sum(-1, keepdim=True, dtype=torch.float32).div_(y.shape[-1])
        d_x: Tensor = torch.addcmul(grads[0].float(), y.float(), along, value=-1).mul_(scale)
        return d_x.to(y.dtype)


def rotary_table(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (positions, 1, D / 2) in fp32."""
    frequency = 1.0 / ROPE_BASE ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(positions, dtype=torch.float32)[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions. x (..., T, H, D), cos and sin (T, 1, D / 2).

    The pairs are (i, i + D/2), turned clockwise as nanochat does.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
