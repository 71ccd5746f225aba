"""The model once more, in float64, one token, one head, one number at a time; numpy only."""

import math

import numpy as np

from nanochat.config import ModelConfig

Weights = dict[str, np.ndarray]


def logits(weights: Weights, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """Soft-capped logits of one row, (T, V)."""
    stream = [rms(weights["model.embed_tokens.weight"][token].astype(np.float64)) for token in tokens]
    for layer in range(config.depth):
        prefix = f"model.layers.{layer}."
        mixed = attention(weights, prefix + "self_attn.", config, [rms(x) for x in stream])
        stream = [x + y for x, y in zip(stream, mixed, strict=True)]
        stream = [x + mlp(weights, prefix + "mlp.", rms(x)) for x in stream]
    head = weights["lm_head.weight"].astype(np.float64)
    return np.array([15 * np.tanh(head @ rms(x) / 15) for x in stream])


def rms(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + 1.1920929e-7)


def mlp(weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    inner = weights[prefix + "fc1.weight"].astype(np.float64) @ x
    return weights[prefix + "fc2.weight"].astype(np.float64) @ np.array([max(v, 0.0) ** 2 for v in inner])


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """Each pair (i, i + D/2) turned clockwise by position * 10000 ** (-2i / D)."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(x))
        y[i] = x[i] * math.cos(angle) + x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) - x[i] * math.sin(angle)
    return y


def attention(weights: Weights, prefix: str, config: ModelConfig, xs: list[np.ndarray]) -> list[np.ndarray]:
    size, share = config.head_dim, config.heads // config.key_heads

    def project(name: str, x: np.ndarray, head: int) -> np.ndarray:
        return weights[f"{prefix}{name}_proj.weight"][head * size : (head + 1) * size].astype(np.float64) @ x

    out = []
    for t, x in enumerate(xs):
        heads = []
        for head in range(config.heads):
            q = rms(rotated(project("q", x, head), t))
            keys = [rms(rotated(project("k", xs[s], head // share), s)) for s in range(t + 1)]
            scores = [math.exp(float(q @ k) / math.sqrt(size)) for k in keys]
            values = [project("v", xs[s], head // share) for s in range(t + 1)]
            heads.append(sum(score * v for score, v in zip(scores, values, strict=True)) / sum(scores))
        out.append(weights[prefix + "o_proj.weight"].astype(np.float64) @ np.concatenate(heads))
    return out
