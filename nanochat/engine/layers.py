"""The model's forward pass over tokens of many sequences, for the runners that compute with torch.

What differs between devices is handed in: how a matrix multiplies, where a token's angles lie, and attention. The
mathematics is that of nanochat.model; queries, keys and values come from one matrix here.
"""

# T tokens, C width, H query heads, K key heads, D head size, V vocabulary

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.config import ModelConfig
from nanochat.loss import soft_cap
from nanochat.model import norm, rotary_table, rotate

log = logging.getLogger(__name__)

Matrix = Callable[[Tensor], Tensor]  # (T, in) -> (T, out), in a layout and precision of its own
Pack = Callable[[Tensor], Matrix]  # of a weight (out, in)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # q (T, H, D), k and v (T, K, D), layer -> (T, H, D)


@dataclass(frozen=True, slots=True)
class Between:
    """What is computed between the matrices; a device may have it fused."""

    turn: Callable[[Tensor, Tensor, Tensor], Tensor]  # heads (T, n, D), cos and sin (T, 1, D / 2): rotated, normed
    add: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x, y -> x + y, norm(x + y)
    square: Callable[[Tensor], Tensor]  # ReLU^2
    cap: Callable[[Tensor], Tensor]  # logits -> fp32, soft-capped


def turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Between.turn by torch's own kernels, and so on."""
    return norm(rotate(heads, cos, sin))


def add(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D103
    x = x + y
    return x, norm(x)


def square(x: Tensor) -> Tensor:  # noqa: D103
    return F.relu(x).square_()


def cap(logits: Tensor) -> Tensor:  # noqa: D103
    return soft_cap(logits.float())


PLAIN = Between(turn, add, square, cap)


@torch.inference_mode()
def compiled(config: ModelConfig, vocab_size: int, device: torch.device, dtype: torch.dtype) -> Between:
    """Each of them one kernel, by torch.compile; PLAIN, and a warning, where that does not work."""
    try:
        fused = Between(torch.compile(turn), torch.compile(add), torch.compile(square), torch.compile(cap))
        turned = config.heads + config.key_heads
        for tokens in (2, 3):  # two numbers, so that torch sees what changes from step to step
            shapes = (turned + config.key_heads, config.head_dim), (1, config.head_dim // 2), (config.width,)
            qkv, angle, x = (torch.ones(tokens, *shape, dtype=dtype, device=device) for shape in shapes)
            fused.turn(qkv[:, :turned], angle, angle)
            fused.add(x, x)
            fused.square(x.repeat(1, 4))
            fused.cap(x.new_ones(tokens, vocab_size))
    except Exception as fault:
        log.warning("Several kernels where one would do: torch.compile failed: %s: %s", type(fault).__name__, fault)
        return PLAIN
    return fused


@dataclass(frozen=True, slots=True)
class Layer:
    """The matrices of one block."""

    qkv: Matrix  # C -> (H + 2 K) D: queries, then keys, then values
    o: Matrix
    fc1: Matrix
    fc2: Matrix


@dataclass(frozen=True, slots=True)
class Network:
    """A model's weights, packed, and its rotary table."""

    config: ModelConfig
    embed: Tensor  # (V, C)
    layers: tuple[Layer, ...]
    head: Matrix
    cos: Tensor  # (context, 1, D / 2)
    sin: Tensor
    between: Between

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens and positions (T,) int64 -> states after the last norm, (T, C)."""
        config = self.config
        turned = config.heads + config.key_heads  # heads that are rotated and normed
        cos, sin = self.cos[positions], self.sin[positions]  # (T, 1, D / 2)
        x = norm(F.embedding(tokens, self.embed).to(cos.dtype))
        y = norm(x)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(y).view(len(tokens), -1, config.head_dim)  # (T, H + 2 K, D)
            qk = self.between.turn(qkv[:, :turned], cos, sin)
            q, k = torch.split(qk, [config.heads, config.key_heads], dim=1)
            x, y = self.between.add(x, layer.o(attend(q, k, qkv[:, turned:], number).flatten(1)))
            x, y = self.between.add(x, layer.fc2(self.between.square(layer.fc1(y))))
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, C) -> soft-capped (R, V) in fp32."""
        return self.between.cap(self.head(hidden))


def load(  # noqa: PLR0913 (where, in which precisions and how are a device's own)
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    pack: Pack,
    stored: torch.dtype,
    active: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    between: Between = PLAIN,
) -> Network:
    """Packs the weights one after another, each asked for once.

    stored: dtype of the embedding.  active: dtype of the activations.
    """

    def block(number: int) -> Layer:
        at = f"model.layers.{number}."
        qkv = torch.cat([weights[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"])
        rest = (weights[at + name] for name in ("self_attn.o_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"))
        return Layer(pack(qkv), *(pack(weight) for weight in rest))

    cos, sin = (table.to(device, active) for table in rotary_table(config.context, config.head_dim))
    return Network(
        config=config,
        embed=weights["model.embed_tokens.weight"].detach().to(device, stored, copy=True),
        layers=tuple(block(number) for number in range(config.depth)),
        head=pack(weights["lm_head.weight"]),
        cos=cos,
        sin=sin,
        between=between,
    )
